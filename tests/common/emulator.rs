//! A driver of the backend that runs the kernels on the CPU. Matrix products are plain loops.
#![allow(unsafe_code)] // memory by its address

use std::collections::HashSet;
use std::ffi::{CString, c_char, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use half::bf16;
use sidereal::backend::cuda::{
    Address, CudaBackend, Driver, FusedActivation, Launch, Outcome, Product,
};
use sidereal::{Dtype, Result};

use super::kernels::{Build, Kernels, device_error};

/// A device that is the emulator.
pub struct Emulator {
    kernels: Arc<Kernels>,
    capture: Mutex<Option<Vec<Asked>>>,
    /// Memory that nobody has taken, in bytes.
    free: Arc<AtomicUsize>,
    num_processors: usize,
    max_shared_bytes: usize,
    has_warpgroups: bool,
    /// Rows, columns and inner dimension of the products that were asked for outside captures.
    plans: Mutex<HashSet<[usize; 3]>>,
    faults: Arc<Faults>,
}

/// What a device is told to get wrong.
#[derive(Default)]
pub struct Faults {
    /// Refuses to begin captures.
    pub refuses_begin: AtomicBool,
    /// Refuses to end captures with a graph.
    pub refuses_end: AtomicBool,
    /// Fails at launches in captures.
    pub refuses_captured_launches: AtomicBool,
    /// Refuses all products.
    pub refuses_products: AtomicBool,
    /// Forgets all plans at the next product.
    pub forgets_plans: AtomicBool,
}

impl Faults {
    fn is(fault: &AtomicBool) -> bool {
        fault.load(Ordering::Relaxed)
    }
}

/// What was asked for while a step was captured.
pub enum Asked {
    Launch { kernel: &'static str, grid: [u32; 3], threads: u32, shared: usize, params: Vec<u8> },
    Product(Product),
}

impl Emulator {
    /// A device with the shared memory of Hopper and a gigabyte of memory.
    pub fn new(kernels: Arc<Kernels>) -> Emulator {
        Emulator {
            kernels,
            capture: Mutex::new(None),
            free: Arc::new(AtomicUsize::new(1 << 30)),
            num_processors: 4,
            max_shared_bytes: 227 << 10,
            has_warpgroups: false,
            plans: Mutex::default(),
            faults: Arc::default(),
        }
    }

    /// What the device gets wrong; it may be set.
    pub fn faults(&self) -> Arc<Faults> {
        Arc::clone(&self.faults)
    }

    fn is_capturing(&self) -> bool {
        self.capture.lock().expect("sound").is_some()
    }

    /// What of the device's memory is free, in bytes; it may be set.
    pub fn memory(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.free)
    }

    pub fn with_processors(self, num_processors: usize) -> Emulator {
        Emulator { num_processors, ..self }
    }

    pub fn with_shared_bytes(self, max_shared_bytes: usize) -> Emulator {
        Emulator { max_shared_bytes, ..self }
    }

    /// A device that multiplies by warpgroups, as Hopper does.
    pub fn with_warpgroups(self) -> Emulator {
        Emulator { has_warpgroups: true, ..self }
    }

    fn multiply_now(&self, product: &Product) {
        multiply(product);
        let size = product.out_dtype.size();
        for row in 0..product.rows {
            let at = product.out.offset(row * product.stride * size);
            self.kernels.note_write(at, product.columns * size);
        }
    }

    /// A backend on the repository's kernels.
    pub fn backend(build: Build, dtype: Dtype) -> CudaBackend<Emulator> {
        CudaBackend::new(Emulator::new(Kernels::load(build)), dtype)
    }
}

impl Driver for Emulator {
    type Graph = Vec<Asked>;

    fn name(&self) -> String {
        "emulator".into()
    }

    fn product_library(&self) -> String {
        "loops 1.0".into()
    }

    fn num_processors(&self) -> usize {
        self.num_processors
    }

    fn max_shared_bytes(&self) -> usize {
        self.max_shared_bytes
    }

    fn has_warpgroups(&self) -> bool {
        self.has_warpgroups
    }

    fn free_bytes(&self) -> Result<usize> {
        Ok(self.free.load(Ordering::Relaxed))
    }

    fn allocate(&self, bytes: usize, name: &str) -> Result<Option<u64>> {
        assert!(!self.is_capturing(), "memory is taken in a capture");
        let take = |free: usize| free.checked_sub(bytes);
        if self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            return Ok(None);
        }
        let name = CString::new(name).expect("no zero");
        // SAFETY: checker.cpp declares it so.
        let at = unsafe {
            let allocate = self
                .kernels
                .library
                .get::<unsafe extern "C" fn(usize, *const c_char) -> *mut c_void>("emulator_alloc");
            allocate.expect("in checker.cpp")(bytes, name.as_ptr())
        };
        Ok(Some(at as u64))
    }

    fn free(&self, address: Address, bytes: usize) {
        assert!(!self.is_capturing(), "memory is freed in a capture");
        self.free.fetch_add(bytes, Ordering::Relaxed);
        // SAFETY: checker.cpp declares it so.
        unsafe {
            let free = self
                .kernels
                .library
                .get::<unsafe extern "C" fn(*mut c_void, usize)>("emulator_free");
            free.expect("in checker.cpp")(address.get() as *mut c_void, bytes);
        }
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        assert!(!self.is_capturing(), "a graph holds no copies");
        // SAFETY: the backend copies into memory that it allocated.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.get() as *mut u8, bytes.len());
        }
        self.kernels.note_write(to, bytes.len());
        Ok(())
    }

    fn upload_beside(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.upload(to, bytes)
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        assert!(!self.is_capturing(), "a graph waits for nothing");
        // SAFETY: the backend copies out of memory that it allocated.
        unsafe {
            std::ptr::copy_nonoverlapping(from.get() as *const u8, bytes.as_mut_ptr(), bytes.len());
        }
        Ok(())
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let (kernel, grid, threads) = (launch.kernel(), launch.grid(), launch.threads());
        let (shared, params) = (launch.shared_bytes(), launch.params());
        if shared > self.max_shared_bytes {
            let most = self.max_shared_bytes;
            return Err(device_error(&format!(
                "{kernel} wants {shared} bytes, a block has {most}"
            )));
        }
        if let Some(capture) = &mut *self.capture.lock().expect("sound") {
            if Faults::is(&self.faults.refuses_captured_launches) {
                return Err(device_error("this launch cannot be captured"));
            }
            let params = params.to_vec();
            capture.push(Asked::Launch { kernel, grid, threads, shared, params });
            return Ok(());
        }
        self.kernels.launch(kernel, grid, threads, shared, params)
    }

    /// Refuses some, as libraries do.
    fn multiply(&self, product: &Product) -> Result<Outcome> {
        let is_refused = (product.columns + product.inner) % 8 == 3;
        if is_refused || Faults::is(&self.faults.refuses_products) {
            // Rows that only pad a step are arbitrary, and so is what becomes of them.
            let bytes = product.rows * product.inner * product.dtype.size();
            self.kernels.note_write(product.x, bytes);
            return Ok(Outcome::Refused);
        }
        let mut plans = self.plans.lock().expect("sound");
        if self.faults.forgets_plans.swap(false, Ordering::Relaxed) {
            plans.clear();
        }
        let shape = [product.rows, product.columns, product.inner];
        if let Some(capture) = &mut *self.capture.lock().expect("sound") {
            if !plans.contains(&shape) {
                return Ok(Outcome::Unplanned);
            }
            capture.push(Asked::Product(*product));
            return Ok(Outcome::Done);
        }
        plans.insert(shape);
        self.multiply_now(product);
        Ok(Outcome::Done)
    }

    fn begin_capture(&self) -> Result<()> {
        if Faults::is(&self.faults.refuses_begin) {
            return Err(device_error("captures cannot begin"));
        }
        let before = self.capture.lock().expect("sound").replace(Vec::new());
        assert!(before.is_none(), "one capture at a time");
        Ok(())
    }

    fn end_capture(&self) -> Result<Option<Vec<Asked>>> {
        let graph = self.capture.lock().expect("sound").take().expect("it was begun");
        if Faults::is(&self.faults.refuses_end) {
            return Err(device_error("captures cannot end"));
        }
        // A graph takes memory as well: only whether there is any counts.
        Ok((self.free.load(Ordering::Relaxed) >= graph.len()).then_some(graph))
    }

    fn replay(&self, graph: &Vec<Asked>) -> Result<()> {
        for asked in graph {
            match asked {
                Asked::Launch { kernel, grid, threads, shared, params } => {
                    self.kernels.launch(kernel, *grid, *threads, *shared, params)?;
                }
                Asked::Product(product) => self.multiply_now(product),
            }
        }
        Ok(())
    }
}

/// Numbers in the device's memory.
fn read(at: Address, count: usize, dtype: Dtype) -> Vec<f32> {
    // SAFETY: the backend allocated that many numbers there, aligned.
    unsafe {
        match dtype {
            Dtype::Bf16 => {
                let values = std::slice::from_raw_parts(at.get() as *const bf16, count);
                values.iter().map(|value| value.to_f32()).collect()
            }
            _ => std::slice::from_raw_parts(at.get() as *const f32, count).to_vec(),
        }
    }
}

fn multiply(product: &Product) {
    let Product { rows, columns, inner, stride, .. } = *product;
    let x = read(product.x, rows * inner, product.dtype);
    let weight = read(product.weight, columns * inner, product.dtype);
    let bias = product.bias.map(|bias| read(bias, columns, product.out_dtype));
    for row in 0..rows {
        for column in 0..columns {
            let (x, weight) = (&x[row * inner..][..inner], &weight[column * inner..][..inner]);
            let dot: f64 = x.iter().zip(weight).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            let mut value = dot as f32 + bias.as_ref().map_or(0.0, |bias| bias[column]);
            value = match product.activation {
                None => value,
                Some(FusedActivation::Relu) => value.max(0.0),
                Some(FusedActivation::GeluTanh) => {
                    let inner = 0.797_884_6 * (value + 0.044_715 * value.powi(3));
                    0.5 * value * (1.0 + inner.tanh())
                }
            };
            let at = row * stride + column;
            // SAFETY: the backend allocated `rows` rows of `stride` numbers there.
            unsafe {
                match product.out_dtype {
                    Dtype::Bf16 => {
                        let out = (product.out.get() as *mut bf16).add(at);
                        let before = if product.adds { (*out).to_f32() } else { 0.0 };
                        *out = bf16::from_f32(before + value);
                    }
                    _ => {
                        let out = (product.out.get() as *mut f32).add(at);
                        *out = if product.adds { *out + value } else { value };
                    }
                }
            }
        }
    }
}
