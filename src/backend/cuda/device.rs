//! A device as the backend sees it: its driver, its failures, its counters, and the capture lock.
//!
//! A step is captured as a graph by one thread while no other may call the driver, since what other
//! threads ask for would end up in the graph. Whatever goes wrong in a capture ends that capture and
//! nothing else: the step is then run eagerly, and only what fails there fails the device.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread::{self, ThreadId};

use bytemuck::Pod;

use super::driver::{Address, Driver, Launch, Outcome, Product, Traffic};
use crate::error::{Error, Result};

/// Bytes of a copy beside the work after which a capture may begin.
const BYTES_PER_LOCK: usize = 8 << 20;

/// Why steps are not run.
#[derive(Default)]
struct Failures {
    /// The device failed: it is not asked for anything any more.
    lasting: Option<String>,
    /// There was no memory for what a step needed: that step is lost, and nothing else.
    passing: Option<String>,
}

/// A driver, and what the backend keeps of it. After a failure steps ask for nothing, and the next
/// call that waits for the device returns the failure.
pub(super) struct Device<D: Driver> {
    pub driver: D,
    failures: Mutex<Failures>,
    /// Shared by all that call the driver; exclusive while a step is captured. No other lock of the
    /// backend may be held by a thread that waits for it, but those of the pass that it runs.
    capture_lock: RwLock<()>,
    capture: Mutex<Option<Capture>>,
    counters: Counters,
}

/// A capture that is under way.
struct Capture {
    thread: ThreadId,
    /// Why the graph will not be complete.
    interruption: Option<Interruption>,
    /// Memory that was given back meanwhile; freed when the capture has ended.
    given_back: Vec<(Address, usize)>,
}

/// Why a capture did not make a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interruption {
    /// Something was missing that an eager run makes: memory, a copy, the plan of a product.
    Incomplete,
    /// There was no memory for the graph.
    OutOfMemory,
    /// The device refused to capture the step.
    Refused,
}

#[derive(Default)]
struct Counters {
    launches: AtomicU64,
    products: AtomicU64,
    refused_products: AtomicU64,
    replays: AtomicU64,
    captures: AtomicU64,
    abandoned_captures: AtomicU64,
    evicted_graphs: AtomicU64,
    uploads: AtomicU64,
    upload_bytes: AtomicU64,
    uploads_beside: AtomicU64,
    downloads: AtomicU64,
    allocations: AtomicU64,
    /// Memory given back that graphs may refer to.
    releases: AtomicU64,
    flops: AtomicU64,
}

/// A captured step, and the floating-point operations of its products.
pub(super) struct Graph<D: Driver> {
    graph: D::Graph,
    flops: u64,
}

/// Ends the capture under way, whatever happens: also where the step panics.
struct CaptureGuard<'d, D: Driver> {
    device: &'d Device<D>,
    has_ended: bool,
}

impl<'d, D: Driver> CaptureGuard<'d, D> {
    /// None where the device refuses.
    fn begin(device: &'d Device<D>) -> Option<CaptureGuard<'d, D>> {
        device.driver.begin_capture().ok()?;
        let capture =
            Capture { thread: thread::current().id(), interruption: None, given_back: Vec::new() };
        *device.capture() = Some(capture);
        Some(CaptureGuard { device, has_ended: false })
    }

    fn end(mut self) -> std::result::Result<D::Graph, Interruption> {
        self.has_ended = true;
        let ended = self.device.driver.end_capture();
        let interruption = self.device.capture().as_ref().and_then(|it| it.interruption);
        match (interruption, ended) {
            (Some(interruption), _) => Err(interruption),
            (None, Ok(Some(graph))) => Ok(graph),
            (None, Ok(None)) => Err(Interruption::OutOfMemory),
            (None, Err(_)) => Err(Interruption::Refused),
        }
    }
}

impl<D: Driver> Drop for CaptureGuard<'_, D> {
    fn drop(&mut self) {
        if !self.has_ended {
            // The step panicked: what it asked for so far is dropped.
            let _ = self.device.driver.end_capture();
        }
        let capture = self.device.capture().take();
        for (address, bytes) in capture.into_iter().flat_map(|capture| capture.given_back) {
            self.device.driver.free(address, bytes);
        }
    }
}

impl<D: Driver> Device<D> {
    pub fn new(driver: D) -> Device<D> {
        Device {
            driver,
            failures: Mutex::default(),
            capture_lock: RwLock::new(()),
            capture: Mutex::new(None),
            counters: Counters::default(),
        }
    }

    /// Grows when memory is given back that graphs may refer to.
    pub fn num_releases(&self) -> u64 {
        self.counters.releases.load(Ordering::Relaxed)
    }

    pub fn traffic(&self) -> Traffic {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        Traffic {
            launches: read(&counters.launches),
            products: read(&counters.products),
            refused_products: read(&counters.refused_products),
            replays: read(&counters.replays),
            captures: read(&counters.captures),
            abandoned_captures: read(&counters.abandoned_captures),
            evicted_graphs: read(&counters.evicted_graphs),
            uploads: read(&counters.uploads),
            upload_bytes: read(&counters.upload_bytes),
            uploads_beside: read(&counters.uploads_beside),
            downloads: read(&counters.downloads),
            allocations: read(&counters.allocations),
        }
    }

    /// Notes that there was no memory for what a step needs.
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

    /// The first failure of the device or of a step, if there was one; that of a step is then over.
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

    fn capture(&self) -> std::sync::MutexGuard<'_, Option<Capture>> {
        self.capture.lock().expect("no holder panics")
    }

    /// Whether this thread captures a step.
    fn is_capturing(&self) -> bool {
        let thread = thread::current().id();
        self.capture().as_ref().is_some_and(|capture| capture.thread == thread)
    }

    /// Waits until no other thread captures a step, and keeps others from it. None where this thread
    /// captures one.
    fn lock(&self) -> Option<RwLockReadGuard<'_, ()>> {
        (!self.is_capturing())
            .then(|| self.capture_lock.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends the capture of this thread before its graph is complete.
    fn interrupt(&self, interruption: Interruption) -> Error {
        if let Some(capture) = &mut *self.capture() {
            capture.interruption.get_or_insert(interruption);
        }
        self.error("a step that is captured cannot be completed")
    }

    /// Calls the driver, outside captures. A failure is lasting.
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

    /// Calls the driver for what a graph can hold, unless the step has failed. A failure is lasting,
    /// but in a capture, which it ends.
    fn ask_for_step<T>(
        &self,
        counter: &AtomicU64,
        work: impl FnOnce(&D) -> Result<T>,
    ) -> Result<T> {
        self.check()?;
        if let Some(_lock) = self.lock() {
            return self.ask(counter, work);
        }
        let is_complete =
            self.capture().as_ref().is_some_and(|capture| capture.interruption.is_none());
        match is_complete {
            true => work(&self.driver).map_err(|_| self.interrupt(Interruption::Refused)),
            false => Err(self.interrupt(Interruption::Incomplete)),
        }
    }

    /// A lock under which the driver does what no graph can hold. In a capture of this thread an
    /// error, which ends the capture: the step is run eagerly instead.
    fn lock_uncaptured(&self) -> Result<RwLockReadGuard<'_, ()>> {
        self.lock().ok_or_else(|| self.interrupt(Interruption::Incomplete))
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
        // The next call that waits for the device returns a failure.
        let _ = self.ask_for_step(&self.counters.launches, |driver| driver.launch(&launch));
    }

    /// Enqueues a product and returns whether the device's library took it.
    pub fn multiply(&self, product: &Product) -> bool {
        let flops = 2 * product.rows * product.columns * product.inner;
        self.counters.flops.fetch_add(flops as u64, Ordering::Relaxed);
        let products = &self.counters.products;
        match self.ask_for_step(products, |driver| driver.multiply(product)) {
            Ok(Outcome::Refused) => {
                self.counters.refused_products.fetch_add(1, Ordering::Relaxed);
                false
            }
            Ok(Outcome::Unplanned) => {
                self.interrupt(Interruption::Incomplete);
                true
            }
            // The next call that waits for the device returns a failure.
            Ok(Outcome::Done) | Err(_) => true,
        }
    }

    pub fn replay(&self, graph: &Graph<D>) {
        self.counters.flops.fetch_add(graph.flops, Ordering::Relaxed);
        let _ = self.ask_for_step(&self.counters.replays, |driver| driver.replay(&graph.graph));
    }

    /// A graph of the launches and products that `work` asks for, none of which is done yet. Other
    /// threads that call the driver wait meanwhile.
    pub fn capture_step(&self, work: impl FnOnce()) -> std::result::Result<Graph<D>, Interruption> {
        let _alone = self.capture_lock.write().unwrap_or_else(PoisonError::into_inner);
        if self.check().is_err() {
            return Err(Interruption::Incomplete);
        }
        let before = self.flops();
        let captured = match CaptureGuard::begin(self) {
            None => Err(Interruption::Refused),
            Some(guard) => {
                work();
                guard.end()
            }
        };
        let flops = self.flops() - before;
        self.counters.flops.fetch_sub(flops, Ordering::Relaxed);
        let counter = match &captured {
            Ok(_) => &self.counters.captures,
            Err(_) => &self.counters.abandoned_captures,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        captured.map(|graph| Graph { graph, flops })
    }

    /// Counts graphs that were dropped to make room for others.
    pub fn note_evicted_graphs(&self, count: usize) {
        self.counters.evicted_graphs.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Floating-point operations of all products.
    pub fn flops(&self) -> u64 {
        self.counters.flops.load(Ordering::Relaxed)
    }

    /// # Errors
    /// [`Error::Device`]; where there is no memory, the device goes on.
    pub fn allocate(&self, bytes: usize, name: &str) -> Result<Address> {
        self.check_lasting()?;
        let _lock = self.lock_uncaptured()?;
        match self.ask(&self.counters.allocations, |driver| driver.allocate(bytes, name))? {
            Some(address) => Ok(Address(address)),
            None => {
                let free = self.driver.free_bytes().unwrap_or(0);
                Err(self.error(&format!(
                    "there is no memory for {name}: {bytes} bytes are needed, {free} are free"
                )))
            }
        }
    }

    /// Whether memory may be taken now. In a capture of this thread it may not, and the capture
    /// ends.
    pub fn may_allocate(&self) -> bool {
        let is_capturing = self.is_capturing();
        if is_capturing {
            self.interrupt(Interruption::Incomplete);
        }
        !is_capturing
    }

    /// Gives memory back. `is_in_graphs`: graphs may refer to it. In a capture of this thread the
    /// memory is freed later, and the capture ends, since its graph might refer to it as well.
    pub fn free(&self, address: Address, bytes: usize, is_in_graphs: bool) {
        let lock = self.lock();
        self.counters.releases.fetch_add(is_in_graphs.into(), Ordering::Relaxed);
        match (lock, &mut *self.capture()) {
            (None, Some(capture)) => {
                capture.given_back.push((address, bytes));
                capture.interruption.get_or_insert(Interruption::Incomplete);
            }
            _ => self.driver.free(address, bytes),
        }
    }

    pub fn upload(&self, to: Address, bytes: &[u8]) {
        if bytes.is_empty() || self.check().is_err() {
            return;
        }
        let Ok(_lock) = self.lock_uncaptured() else { return };
        self.counters.upload_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let _ = self.ask(&self.counters.uploads, |driver| driver.upload(to, bytes));
    }

    /// # Errors
    /// [`Error::Device`].
    pub fn upload_beside(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.check_lasting()?;
        self.counters.upload_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.counters.uploads_beside.fetch_add(1, Ordering::Relaxed);
        for (index, part) in bytes.chunks(BYTES_PER_LOCK).enumerate() {
            let to = to.offset(index * BYTES_PER_LOCK);
            let _lock = self.lock_uncaptured()?;
            self.ask(&self.counters.uploads, |driver| driver.upload_beside(to, part))?;
        }
        Ok(())
    }

    /// # Errors
    /// [`Error::Device`].
    pub fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.check()?;
        if bytes.is_empty() {
            return Ok(());
        }
        let _lock = self.lock_uncaptured()?;
        self.ask(&self.counters.downloads, |driver| driver.download(from, bytes))?;
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
