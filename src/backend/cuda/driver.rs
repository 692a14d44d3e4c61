//! What the backend asks of a device, and the device's failures.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, ThreadId};

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

    /// The address so many bytes on.
    pub fn offset(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
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

/// Bytes that memory which is written often has at least.
const LEAST_OFTEN_WRITTEN: usize = 64 << 10;

/// A device. What it is asked for happens in that order, and need not have happened when a call
/// returns, but for [`download`](Driver::download).
pub trait Driver: Send + Sync + 'static {
    /// Launches and products that can be done again.
    type Recording: Send;

    /// The device's name.
    fn name(&self) -> String;
    /// Multiprocessors: each runs a block of threads or a few at a time.
    fn num_processors(&self) -> usize;
    /// Shared memory that a block may have, in bytes.
    fn max_shared_bytes(&self) -> usize;
    /// Memory that nobody has taken, in bytes.
    ///
    /// # Errors
    /// [`Error::Device`], as for all that follow.
    fn free_bytes(&self) -> Result<usize>;
    /// Memory of so many bytes, aligned to 256, which the backend frees, or none where the device
    /// has not so much; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn allocate(&self, bytes: usize, name: &str) -> Result<Option<u64>>;
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
    /// Those of them that are made beside the work, into memory of their own: weights, catalogs,
    /// filters.
    pub uploads_beside: u64,
    /// Copies from the device: each waits for it.
    pub downloads: u64,
    /// Memory taken, in pieces.
    pub allocations: u64,
}

/// Why nothing is done any more.
enum Failure {
    /// The device, or what it was asked for, is at fault.
    Lasting(String),
    /// There was no memory for what a step needed: the step is lost, and nothing else.
    Passing(String),
}

/// A device with its first failure: what is asked for after it is not done, and what waits for the
/// device is told of it.
pub(super) struct Device<D: Driver> {
    pub driver: D,
    failure: Mutex<Option<Failure>>,
    /// Held by who asks: while a step is recorded, others wait.
    turn: Mutex<()>,
    recorder: Mutex<Option<ThreadId>>,
    launches: AtomicU64,
    products: AtomicU64,
    replays: AtomicU64,
    uploads: AtomicU64,
    upload_bytes: AtomicU64,
    uploads_beside: AtomicU64,
    downloads: AtomicU64,
    allocations: AtomicU64,
    releases: AtomicU64,
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
            turn: Mutex::new(()),
            recorder: Mutex::new(None),
            launches: AtomicU64::new(0),
            products: AtomicU64::new(0),
            replays: AtomicU64::new(0),
            uploads: AtomicU64::new(0),
            upload_bytes: AtomicU64::new(0),
            uploads_beside: AtomicU64::new(0),
            downloads: AtomicU64::new(0),
            allocations: AtomicU64::new(0),
            releases: AtomicU64::new(0),
            flops: AtomicU64::new(0),
        }
    }

    /// Grows when memory is given back that recorded steps may refer to.
    pub fn num_releases(&self) -> u64 {
        self.releases.load(Ordering::Relaxed)
    }

    pub fn traffic(&self) -> Traffic {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            launches: read(&self.launches),
            products: read(&self.products),
            replays: read(&self.replays),
            uploads: read(&self.uploads),
            upload_bytes: read(&self.upload_bytes),
            uploads_beside: read(&self.uploads_beside),
            downloads: read(&self.downloads),
            allocations: read(&self.allocations),
        }
    }

    fn note(&self, failure: Failure) {
        self.failure.lock().expect("no holder panics").get_or_insert(failure);
    }

    /// There was no memory for what a step needs.
    pub fn fail_step(&self, error: Error) {
        if let Error::Device { reason, .. } = error {
            self.note(Failure::Passing(reason));
        }
    }

    /// The first failure, if there was one.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn check(&self) -> Result<()> {
        match &*self.failure.lock().expect("no holder panics") {
            Some(Failure::Lasting(reason) | Failure::Passing(reason)) => Err(self.error(reason)),
            None => Ok(()),
        }
    }

    /// The same, and a failure that passes is over.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn take_failure(&self) -> Result<()> {
        let failed = self.check();
        let mut failure = self.failure.lock().expect("no holder panics");
        if matches!(*failure, Some(Failure::Passing(_))) {
            *failure = None;
        }
        failed
    }

    fn error(&self, reason: &str) -> Error {
        Error::Device { device: self.driver.name(), reason: reason.into() }
    }

    /// Keeps others from asking; none where this thread records and they are kept from it already.
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        let records =
            *self.recorder.lock().expect("no holder panics") == Some(thread::current().id());
        (!records).then(|| self.turn.lock().expect("no holder panics"))
    }

    /// The same for what no recording can hold.
    fn turn_unrecorded(&self) -> MutexGuard<'_, ()> {
        self.turn()
            .expect("a step that was seen before takes and frees no memory and copies nothing")
    }

    /// Does something unless something failed before.
    fn attempt<T>(&self, counter: &AtomicU64, work: impl FnOnce(&D) -> Result<T>) -> Option<T> {
        self.check().ok()?;
        counter.fetch_add(1, Ordering::Relaxed);
        work(&self.driver).map_err(|error| self.note_lasting(error)).ok()
    }

    fn note_lasting(&self, error: Error) {
        let reason = match error {
            Error::Device { reason, .. } => reason,
            other => other.to_string(),
        };
        self.note(Failure::Lasting(reason));
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
        let grid = grid.map(|blocks| u32::try_from(blocks).expect("a grid that a device can have"));
        let params = bytemuck::bytes_of(params);
        let launch = Launch { kernel, grid, threads, shared_bytes, params };
        let _turn = self.turn();
        self.attempt(&self.launches, |driver| driver.launch(&launch));
    }

    pub fn multiply(&self, product: &Product) {
        if product.rows > 0 && product.columns > 0 {
            let flops = 2 * product.rows * product.columns * product.inner;
            self.flops.fetch_add(flops as u64, Ordering::Relaxed);
            let _turn = self.turn();
            self.attempt(&self.products, |driver| driver.multiply(product));
        }
    }

    pub fn replay(&self, recording: &Recording<D>) {
        self.flops.fetch_add(recording.flops, Ordering::Relaxed);
        let _turn = self.turn_unrecorded();
        self.attempt(&self.replays, |driver| driver.replay(&recording.recording));
    }

    /// What `work` asks for, instead of doing it. Nothing else may come between, so other threads
    /// wait.
    pub fn record(&self, work: impl FnOnce()) -> Option<Recording<D>> {
        let _turn = self.turn_unrecorded();
        let (uncounted, before) = (AtomicU64::new(0), self.flops());
        self.attempt(&uncounted, D::begin_recording)?;
        *self.recorder.lock().expect("no holder panics") = Some(thread::current().id());
        work();
        *self.recorder.lock().expect("no holder panics") = None;
        let flops = self.flops() - before;
        self.flops.fetch_sub(flops, Ordering::Relaxed);
        let recording = self.attempt(&uncounted, D::end_recording)?;
        Some(Recording { recording, flops })
    }

    /// Floating-point operations of all products.
    pub fn flops(&self) -> u64 {
        self.flops.load(Ordering::Relaxed)
    }

    /// # Errors
    /// [`Error::Device`]; where there is no memory, the device goes on.
    fn allocate(&self, bytes: usize, name: &str) -> Result<Address> {
        self.check()?;
        let _turn = self.turn_unrecorded();
        self.allocations.fetch_add(1, Ordering::Relaxed);
        match self.driver.allocate(bytes, name) {
            Ok(Some(address)) => Ok(Address(address)),
            Ok(None) => {
                let free = self.driver.free_bytes().unwrap_or(0);
                Err(self.error(&format!(
                    "there is no memory for {name}: {bytes} bytes are needed, {free} are free"
                )))
            }
            Err(error) => {
                self.note_lasting(error);
                self.check().map(|()| unreachable!("it was just noted"))
            }
        }
    }

    fn upload(&self, to: Address, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.upload_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let _turn = self.turn_unrecorded();
        self.attempt(&self.uploads, |driver| driver.upload(to, bytes));
    }

    fn upload_beside(&self, to: Address, bytes: &[u8]) {
        self.upload_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.uploads_beside.fetch_add(1, Ordering::Relaxed);
        let _turn = self.turn_unrecorded();
        self.attempt(&self.uploads, |driver| driver.upload_beside(to, bytes));
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        if !bytes.is_empty() {
            let _turn = self.turn_unrecorded();
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
    /// Whether recorded steps may hold its address.
    is_recorded: bool,
}

impl<D: Driver> DeviceMemory<D> {
    /// No memory yet.
    pub fn none(device: &Arc<Device<D>>, name: &'static str) -> DeviceMemory<D> {
        let device = Arc::clone(device);
        DeviceMemory { device, address: Address(0), bytes: 0, name, is_recorded: true }
    }

    /// A copy of these values, made beside the work.
    ///
    /// # Errors
    /// [`Error::Device`]; where there is no memory, the device goes on.
    pub fn of<T: Pod>(
        device: &Arc<Device<D>>,
        values: &[T],
        name: &'static str,
    ) -> Result<DeviceMemory<D>> {
        let mut memory = DeviceMemory::none(device, name);
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if !bytes.is_empty() {
            memory.allocate(bytes.len())?;
            device.upload_beside(memory.address, bytes);
        }
        device.check()?;
        Ok(memory)
    }

    /// The same for what steps find through tables: catalogs and filters, which come and go while
    /// requests run.
    ///
    /// # Errors
    /// [`Error::Device`]; where there is no memory, the device goes on.
    pub fn of_tables<T: Pod>(
        device: &Arc<Device<D>>,
        values: &[T],
        name: &'static str,
    ) -> Result<DeviceMemory<D>> {
        let mut memory = DeviceMemory::of(device, values, name)?;
        memory.is_recorded = false;
        Ok(memory)
    }

    /// At least so much memory; what it held is lost where it has to grow. Where there is not so
    /// much, the step fails.
    pub fn reserve(&mut self, bytes: usize) {
        if bytes > self.bytes
            && let Err(error) = self.allocate(bytes)
        {
            self.device.fail_step(error);
        }
    }

    /// The same where the device must have it.
    ///
    /// # Errors
    /// [`Error::Device`]; where there is no memory, the device goes on.
    pub fn allocate(&mut self, bytes: usize) -> Result<()> {
        self.release();
        if bytes > 0 {
            (self.address, self.bytes) = (self.device.allocate(bytes, self.name)?, bytes);
        }
        Ok(())
    }

    /// Becomes a copy of these values.
    pub fn write<T: Pod>(&mut self, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.reserve(bytes.len());
        if self.bytes >= bytes.len() {
            self.device.upload(self.address, bytes);
        }
    }

    /// The same for what is written in every pass: grows in leaps, so that it soon grows no more.
    pub fn write_often<T: Pod>(&mut self, values: &[T]) {
        self.make_room(size_of_val(values));
        self.write(values);
    }

    /// Room for what is going to be written often.
    pub fn make_room(&mut self, bytes: usize) {
        if bytes > self.bytes {
            self.reserve(bytes.next_power_of_two().max(LEAST_OFTEN_WRITTEN));
        }
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
        self.address_at(offset).get()
    }

    /// The same for a product.
    pub fn address_at(&self, offset: usize) -> Address {
        self.address.offset(offset)
    }

    fn release(&mut self) {
        if self.bytes > 0 {
            let _turn = self.device.turn();
            self.device.releases.fetch_add(self.is_recorded.into(), Ordering::Relaxed);
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
