//! What the backend asks of a device, and the device's failures.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytemuck::Pod;

use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// A place in a device's memory, or none. Only the backend makes them, of what
/// [`allocate`](Driver::allocate) gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(u64);

impl Address {
    /// The address as the device counts.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// A launch of a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    pub(super) kernel: &'static str,
    pub(super) grid: [u32; 3],
    pub(super) threads: u32,
    pub(super) shared_bytes: usize,
    pub(super) params: &'a [u8],
}

impl Launch<'_> {
    /// The kernel's name in `kernels/`.
    pub fn kernel(&self) -> &'static str {
        self.kernel
    }

    /// Blocks in each direction.
    pub fn grid(&self) -> [u32; 3] {
        self.grid
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.threads
    }

    /// Bytes of dynamic shared memory.
    pub fn shared_bytes(&self) -> usize {
        self.shared_bytes
    }

    /// The kernel's one parameter, a struct.
    pub fn params(&self) -> &[u8] {
        self.params
    }
}

/// What a product may do on its way out without a kernel of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FusedActivation {
    /// max(x, 0)
    Relu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// A matrix product `out = activation(x Wᵀ + bias)`, or `out += x Wᵀ + bias`; sums in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// `[rows, inner]`
    pub x: Address,
    /// `[columns, inner]`
    pub weight: Address,
    /// `[columns]` in the type of `out`.
    pub bias: Option<Address>,
    /// `[rows, stride]`, of which the first `columns` are written.
    pub out: Address,
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// Rows of `weight`.
    pub columns: usize,
    /// Columns of `x` and `weight`.
    pub inner: usize,
    /// Numbers from a row of `out` to the next.
    pub stride: usize,
    /// Of `x` and `weight`.
    pub dtype: Dtype,
    /// Of `out` and `bias`.
    pub out_dtype: Dtype,
    /// Whether what `out` holds is added to.
    pub adds: bool,
    /// Where `adds` is not set.
    pub activation: Option<FusedActivation>,
}

/// A device. What it is asked for happens in that order, and need not have happened when a call
/// returns, but for [`download`](Driver::download).
pub trait Driver: Send + Sync + 'static {
    /// Launches and products that can be done again.
    type Recording: Send;

    /// The device's name.
    fn name(&self) -> String;
    /// How many blocks of threads run at a time, about.
    fn num_processors(&self) -> usize;
    /// Memory of so many bytes, aligned to 256, which the backend frees; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Device`], as for all that follow.
    fn allocate(&self, bytes: usize, name: &str) -> Result<u64>;
    /// Takes memory back once all that was asked for has happened.
    fn free(&self, address: Address, bytes: usize);
    /// Copies to the device; `bytes` are read before the call returns.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()>;
    /// Copies to memory that nothing uses yet, beside what was asked for before; what is asked for
    /// after it finds the copy. `bytes` are read before the call returns.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn upload_beside(&self, to: Address, bytes: &[u8]) -> Result<()>;
    /// Waits for everything, then copies from the device.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()>;
    /// Runs a kernel.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;
    /// Multiplies.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn multiply(&self, product: &Product) -> Result<()>;
    /// From now on launches and products are kept and not done.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn begin_recording(&self) -> Result<()>;
    /// What was kept.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn end_recording(&self) -> Result<Self::Recording>;
    /// Does what was kept.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn replay(&self, recording: &Self::Recording) -> Result<()>;
}

/// What a device was asked for so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Kernels launched one by one.
    pub launches: u64,
    /// Matrix products asked for one by one.
    pub products: u64,
    /// Recorded steps replayed.
    pub replays: u64,
    /// Copies to the device.
    pub uploads: u64,
    /// Bytes of them.
    pub upload_bytes: u64,
    /// Copies from the device: each waits for it.
    pub downloads: u64,
    /// Memory taken, in pieces.
    pub allocations: u64,
}

/// A device with its first failure: what is asked for after it is not done, and what waits for the
/// device is told of it.
pub(super) struct Device<D: Driver> {
    pub driver: D,
    failure: Mutex<Option<String>>,
    launches: AtomicU64,
    products: AtomicU64,
    replays: AtomicU64,
    uploads: AtomicU64,
    upload_bytes: AtomicU64,
    downloads: AtomicU64,
    allocations: AtomicU64,
    moves: AtomicU64,
    flops: AtomicU64,
}

/// What was recorded, and the operations of its products.
pub(super) struct Recording<D: Driver> {
    recording: D::Recording,
    flops: u64,
}

impl<D: Driver> Device<D> {
    pub fn new(driver: D) -> Device<D> {
        Device {
            driver,
            failure: Mutex::new(None),
            launches: AtomicU64::new(0),
            products: AtomicU64::new(0),
            replays: AtomicU64::new(0),
            uploads: AtomicU64::new(0),
            upload_bytes: AtomicU64::new(0),
            downloads: AtomicU64::new(0),
            allocations: AtomicU64::new(0),
            moves: AtomicU64::new(0),
            flops: AtomicU64::new(0),
        }
    }

    /// Changes when memory that recorded steps may refer to has another address.
    pub fn num_moves(&self) -> u64 {
        self.moves.load(Ordering::Relaxed)
    }

    pub fn traffic(&self) -> Traffic {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            launches: read(&self.launches),
            products: read(&self.products),
            replays: read(&self.replays),
            uploads: read(&self.uploads),
            upload_bytes: read(&self.upload_bytes),
            downloads: read(&self.downloads),
            allocations: read(&self.allocations),
        }
    }

    /// Nothing is done from now on, for this reason.
    pub fn fail(&self, reason: String) {
        self.failure.lock().expect("no holder panics").get_or_insert(reason);
    }

    /// The first failure, if there was one.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn check(&self) -> Result<()> {
        match &*self.failure.lock().expect("no holder panics") {
            Some(reason) => {
                Err(Error::Device { device: self.driver.name(), reason: reason.clone() })
            }
            None => Ok(()),
        }
    }

    /// Does something unless something failed before.
    fn attempt<T>(&self, counter: &AtomicU64, work: impl FnOnce(&D) -> Result<T>) -> Option<T> {
        self.check().ok()?;
        counter.fetch_add(1, Ordering::Relaxed);
        match work(&self.driver) {
            Ok(done) => Some(done),
            Err(error) => {
                let reason = match error {
                    Error::Device { reason, .. } => reason,
                    other => other.to_string(),
                };
                self.fail(reason);
                None
            }
        }
    }

    pub fn launch<P: Pod>(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: u32,
        shared_bytes: usize,
        params: &P,
    ) {
        if grid.contains(&0) {
            return;
        }
        let grid = grid.map(|blocks| blocks as u32);
        let params = bytemuck::bytes_of(params);
        let launch = Launch { kernel, grid, threads, shared_bytes, params };
        self.attempt(&self.launches, |driver| driver.launch(&launch));
    }

    pub fn multiply(&self, product: &Product) {
        if product.rows > 0 && product.columns > 0 {
            let flops = 2 * product.rows * product.columns * product.inner;
            self.flops.fetch_add(flops as u64, Ordering::Relaxed);
            self.attempt(&self.products, |driver| driver.multiply(product));
        }
    }

    pub fn replay(&self, recording: &Recording<D>) {
        self.flops.fetch_add(recording.flops, Ordering::Relaxed);
        self.attempt(&self.replays, |driver| driver.replay(&recording.recording));
    }

    /// What `work` asks for, instead of doing it.
    pub fn record(&self, work: impl FnOnce()) -> Option<Recording<D>> {
        let (uncounted, before) = (AtomicU64::new(0), self.flops());
        self.attempt(&uncounted, D::begin_recording)?;
        work();
        let flops = self.flops() - before;
        self.flops.fetch_sub(flops, Ordering::Relaxed);
        let recording = self.attempt(&uncounted, D::end_recording)?;
        Some(Recording { recording, flops })
    }

    /// Floating-point operations of all products.
    pub fn flops(&self) -> u64 {
        self.flops.load(Ordering::Relaxed)
    }

    fn upload(&self, to: Address, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.upload_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.attempt(&self.uploads, |driver| driver.upload(to, bytes));
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        if !bytes.is_empty() {
            self.attempt(&self.downloads, |driver| driver.download(from, bytes));
        }
        self.check()
    }
}

/// Memory of a device, freed when dropped.
pub(super) struct DeviceMemory<D: Driver> {
    device: Arc<Device<D>>,
    address: Address,
    bytes: usize,
    name: &'static str,
}

impl<D: Driver> DeviceMemory<D> {
    /// No memory yet.
    pub fn none(device: &Arc<Device<D>>, name: &'static str) -> DeviceMemory<D> {
        DeviceMemory { device: Arc::clone(device), address: Address(0), bytes: 0, name }
    }

    pub fn new(device: &Arc<Device<D>>, bytes: usize, name: &'static str) -> DeviceMemory<D> {
        let mut memory = DeviceMemory::none(device, name);
        memory.reserve(bytes);
        memory
    }

    /// A copy of these values that recorded steps find through tables: catalogs come and go while
    /// requests run.
    pub fn of<T: Pod>(
        device: &Arc<Device<D>>,
        values: &[T],
        name: &'static str,
    ) -> DeviceMemory<D> {
        let mut memory = DeviceMemory::none(device, name);
        let bytes: &[u8] = bytemuck::cast_slice(values);
        memory.allocate(bytes.len());
        if memory.bytes >= bytes.len() && !bytes.is_empty() {
            device.upload_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            let upload = |driver: &D| driver.upload_beside(memory.address, bytes);
            device.attempt(&device.uploads, upload);
        }
        memory
    }

    /// At least so much memory; what it held is lost where it has to grow. Says whether it did.
    pub fn reserve(&mut self, bytes: usize) -> bool {
        if bytes <= self.bytes {
            return false;
        }
        self.device.moves.fetch_add(1, Ordering::Relaxed);
        self.allocate(bytes);
        true
    }

    fn allocate(&mut self, bytes: usize) {
        self.release();
        if bytes == 0 {
            return;
        }
        let name = self.name;
        let allocate = |driver: &D| driver.allocate(bytes, name);
        if let Some(address) = self.device.attempt(&self.device.allocations, allocate) {
            (self.address, self.bytes) = (Address(address), bytes);
        }
    }

    /// Becomes a copy of these values. Says whether it had to grow.
    pub fn write<T: Pod>(&mut self, values: &[T]) -> bool {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let grew = self.reserve(bytes.len());
        if self.bytes >= bytes.len() {
            self.device.upload(self.address, bytes);
        }
        grew
    }

    /// Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn read<T: Pod>(&self, values: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        self.device.check()?;
        assert!(bytes.len() <= self.bytes, "what is read lies within the memory");
        self.device.download(self.address, bytes)
    }

    pub fn address(&self) -> Address {
        self.address
    }

    /// The address `offset` bytes on, as kernels take it.
    pub fn at(&self, offset: usize) -> u64 {
        self.address.0 + offset as u64
    }

    /// The same for a product.
    pub fn address_at(&self, offset: usize) -> Address {
        Address(self.at(offset))
    }

    fn release(&mut self) {
        if self.bytes > 0 {
            self.device.driver.free(self.address, self.bytes);
            (self.address, self.bytes) = (Address(0), 0);
        }
    }
}

impl<D: Driver> Drop for DeviceMemory<D> {
    fn drop(&mut self) {
        self.release();
    }
}
