//! A device as the backend has it: its driver, its failures, whose turn it is, and memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread::{self, ThreadId};

use bytemuck::Pod;

use super::driver::{Address, Driver, Launch, Product, Traffic};
use crate::error::{Error, Result};

/// Bytes that memory which is written often has at least.
const LEAST_OFTEN_WRITTEN: usize = 64 << 10;
/// Bytes of a copy beside the work after which a step that is to be recorded may come between.
const BYTES_OF_A_TURN: usize = 8 << 20;

/// Why steps are not done.
#[derive(Default)]
struct Failures {
    /// The device, or what it was asked for, is at fault: nothing is done any more.
    lasting: Option<String>,
    /// There was no memory for what a step needed: that step is lost, and nothing else.
    passing: Option<String>,
}

/// A driver, and what the backend keeps of it. What a step asks for after a failure is not done, and
/// what waits for the device is told of it.
pub(super) struct Device<D: Driver> {
    pub driver: D,
    failures: Mutex<Failures>,
    /// Shared by who asks; alone has it who records a step. Whoever steps takes it before or after
    /// the backend's state, so only one thread at a time may step; others may load weights beside it.
    turn: RwLock<()>,
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

/// A recording that is under way: it ends whatever happens.
struct Recorder<'d, D: Driver> {
    device: &'d Device<D>,
    has_ended: bool,
}

impl<'d, D: Driver> Recorder<'d, D> {
    fn begin(device: &'d Device<D>) -> Result<Recorder<'d, D>> {
        device.driver.begin_recording()?;
        *device.recorder.lock().expect("no holder panics") = Some(thread::current().id());
        Ok(Recorder { device, has_ended: false })
    }

    fn end(mut self) -> Result<Option<D::Recording>> {
        self.has_ended = true;
        self.device.driver.end_recording()
    }
}

impl<D: Driver> Drop for Recorder<'_, D> {
    fn drop(&mut self) {
        *self.device.recorder.lock().expect("no holder panics") = None;
        if !self.has_ended {
            // The step panicked; what it asked for so far is dropped.
            let _ = self.device.driver.end_recording();
        }
    }
}

impl<D: Driver> Device<D> {
    pub fn new(driver: D) -> Device<D> {
        Device {
            driver,
            failures: Mutex::default(),
            turn: RwLock::new(()),
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

    /// There was no memory for what a step needs.
    pub fn fail_step(&self, error: Error) {
        let mut failures = self.failures.lock().expect("no holder panics");
        failures.passing.get_or_insert(reason_of(error));
    }

    /// The first failure of the device or of a step, if there was one.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn check(&self) -> Result<()> {
        let failures = self.failures.lock().expect("no holder panics");
        match failures.lasting.as_ref().or(failures.passing.as_ref()) {
            Some(reason) => Err(self.error(reason)),
            None => Ok(()),
        }
    }

    /// The same, and the failure of a step is over.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn take_failure(&self) -> Result<()> {
        let mut failures = self.failures.lock().expect("no holder panics");
        let passing = failures.passing.take();
        match failures.lasting.as_ref().or(passing.as_ref()) {
            Some(reason) => Err(self.error(reason)),
            None => Ok(()),
        }
    }

    fn check_lasting(&self) -> Result<()> {
        match &self.failures.lock().expect("no holder panics").lasting {
            Some(reason) => Err(self.error(reason)),
            None => Ok(()),
        }
    }

    pub fn error(&self, reason: &str) -> Error {
        Error::Device { device: self.driver.name(), reason: reason.into() }
    }

    /// Keeps steps from being recorded; none where this thread records.
    fn turn(&self) -> Option<RwLockReadGuard<'_, ()>> {
        let recorder = *self.recorder.lock().expect("no holder panics");
        (recorder != Some(thread::current().id()))
            .then(|| self.turn.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The same for what no recording can hold.
    fn turn_unrecorded(&self) -> RwLockReadGuard<'_, ()> {
        self.turn().expect("a step that was seen before takes no memory and copies nothing")
    }

    /// Does something; what fails, fails for good.
    fn ask<T>(&self, counter: &AtomicU64, work: impl FnOnce(&D) -> Result<T>) -> Result<T> {
        counter.fetch_add(1, Ordering::Relaxed);
        work(&self.driver).map_err(|error| {
            let reason = reason_of(error);
            let error = self.error(&reason);
            let mut failures = self.failures.lock().expect("no holder panics");
            failures.lasting.get_or_insert(reason);
            error
        })
    }

    /// Does something for a step unless it has failed.
    fn ask_for_step<T>(
        &self,
        counter: &AtomicU64,
        work: impl FnOnce(&D) -> Result<T>,
    ) -> Result<T> {
        self.check()?;
        self.ask(counter, work)
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
        // What failed is told to who waits.
        let _ = self.ask_for_step(&self.launches, |driver| driver.launch(&launch));
    }

    /// Says whether the device's library could do it.
    pub fn multiply(&self, product: &Product) -> bool {
        let flops = 2 * product.rows * product.columns * product.inner;
        self.flops.fetch_add(flops as u64, Ordering::Relaxed);
        let _turn = self.turn();
        let done = self.ask_for_step(&self.products, |driver| driver.multiply(product));
        // What failed is told to who waits.
        done.unwrap_or(true)
    }

    pub fn replay(&self, recording: &Recording<D>) {
        self.flops.fetch_add(recording.flops, Ordering::Relaxed);
        let _turn = self.turn_unrecorded();
        let _ = self.ask_for_step(&self.replays, |driver| driver.replay(&recording.recording));
    }

    /// What `work` asks for, instead of doing it; none where there is no memory to keep it, or where
    /// it failed. Nothing else may come between, so other threads wait.
    pub fn record(&self, work: impl FnOnce()) -> Option<Recording<D>> {
        let _alone = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        self.check().ok()?;
        let (uncounted, before) = (AtomicU64::new(0), self.flops());
        let recorder = self.ask(&uncounted, |_| Recorder::begin(self)).ok()?;
        work();
        let flops = self.flops() - before;
        self.flops.fetch_sub(flops, Ordering::Relaxed);
        let recording = self.ask(&uncounted, |_| recorder.end()).ok()??;
        self.check().ok().map(|()| Recording { recording, flops })
    }

    /// Floating-point operations of all products.
    pub fn flops(&self) -> u64 {
        self.flops.load(Ordering::Relaxed)
    }

    /// # Errors
    /// [`Error::Device`]; where there is no memory, the device goes on.
    fn allocate(&self, bytes: usize, name: &str) -> Result<Address> {
        self.check_lasting()?;
        let _turn = self.turn_unrecorded();
        match self.ask(&self.allocations, |driver| driver.allocate(bytes, name))? {
            Some(address) => Ok(Address(address)),
            None => {
                let free = self.driver.free_bytes().unwrap_or(0);
                Err(self.error(&format!(
                    "there is no memory for {name}: {bytes} bytes are needed, {free} are free"
                )))
            }
        }
    }

    fn upload(&self, to: Address, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.upload_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let _turn = self.turn_unrecorded();
        let _ = self.ask_for_step(&self.uploads, |driver| driver.upload(to, bytes));
    }

    /// # Errors
    /// [`Error::Device`].
    fn upload_beside(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.check_lasting()?;
        self.upload_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.uploads_beside.fetch_add(1, Ordering::Relaxed);
        for (index, part) in bytes.chunks(BYTES_OF_A_TURN).enumerate() {
            let to = to.offset(index * BYTES_OF_A_TURN);
            let _turn = self.turn_unrecorded();
            self.ask(&self.uploads, |driver| driver.upload_beside(to, part))?;
        }
        Ok(())
    }

    /// # Errors
    /// [`Error::Device`].
    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return self.check();
        }
        let _turn = self.turn_unrecorded();
        self.ask_for_step(&self.downloads, |driver| driver.download(from, bytes))?;
        self.check()
    }
}

/// What an error of the device says of it.
pub(super) fn reason_of(error: Error) -> String {
    match error {
        Error::Device { reason, .. } => reason,
        other => other.to_string(),
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
            device.upload_beside(memory.address, bytes)?;
        }
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
