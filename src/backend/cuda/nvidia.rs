//! NVIDIA GPUs, by cudarc: one stream and one beside it for copies, kernels from the fat binary that
//! `build.rs` made, captured steps as CUDA graphs.
//!
//! Libraries are opened when they are first used, so a binary with this feature starts on a machine
//! without a driver, and says so when it is asked for a device.
#![allow(unsafe_code)] // the driver's interface

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::sys as blas_sys;
use cudarc::driver::result as driver;
use cudarc::driver::sys;
use cudarc::driver::{CudaContext, CudaStream, DriverError};

use super::blas::{self, Blas, CapturedPlans, WORKSPACE_BYTES};
use super::driver::{Address, Driver, Launch, Outcome, Product};
use super::pinned::Pinned;
use crate::error::{Error, Result};

/// The kernels, or nothing where there was no nvcc to compile them.
static KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));
/// Names a fat binary to use instead, for who works on kernels beside a GPU.
const KERNELS_VARIABLE: &str = "SIDEREAL_KERNELS";
/// The version of CUDA that the kernels are compiled for, as drivers count.
const CUDA_VERSION: i32 = 13_000;
/// Memory of the host for copies on their way: of metadata and rules of steps, and of weights,
/// catalogs and filters.
const STAGED_BYTES: usize = 4 << 20;
const STAGED_BYTES_BESIDE: usize = 32 << 20;

const OUT_OF_MEMORY: DriverError = DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);

fn device_error(device: &str, reason: impl ToString) -> Error {
    Error::Device { device: device.into(), reason: reason.to_string() }
}

/// How many GPUs there are.
///
/// # Errors
/// [`Error::Device`] where there is no driver.
pub fn num_devices() -> Result<usize> {
    // SAFETY: it only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        let reason = "no NVIDIA driver is installed (libcuda.so was not found); \"cpu\" needs none";
        return Err(device_error("cuda", reason));
    }
    let count = CudaContext::device_count().map_err(|error| device_error("cuda", error))?;
    Ok(count.max(0) as usize)
}

/// One GPU.
///
/// Memory comes from a pool and goes back to it in the order of the stream, so neither waits for
/// the device.
pub struct CudaDevice {
    name: String,
    num_processors: usize,
    /// Shared memory that a block may have.
    max_shared_bytes: usize,
    has_warpgroups: bool,
    stream: Arc<CudaStream>,
    uploads: Mutex<Pinned>,
    /// For copies beside the stream; all memory is taken here.
    copies: Arc<CudaStream>,
    uploads_beside: Mutex<Pinned>,
    pool: sys::CUmemoryPool,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static str, Function>>,
    /// Always there, but while the device is opened and closed.
    blas: Option<Blas>,
    /// Of products.
    workspace: sys::CUdeviceptr,
    /// The last to go: all else is its own.
    context: Arc<CudaContext>,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: handles of the driver may be used by any thread that has bound their context, which
// every method does first.
unsafe impl Send for CudaDevice {}
// SAFETY: the same; what is changed is behind locks.
unsafe impl Sync for CudaDevice {}

/// A CUDA graph.
pub struct Graph {
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
    context: Arc<CudaContext>,
    /// As long as the graph lives, a step of its shape finds them when it is captured again.
    _plans: CapturedPlans,
}

// SAFETY: a graph is used by one thread at a time, which has bound its context.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: both are ours and used by nobody any more; errors here have nowhere to go.
        unsafe {
            let _ = driver::graph::exec_destroy(self.executable);
            let _ = driver::graph::destroy(self.graph);
        }
    }
}

impl CudaDevice {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`Error::Device`] where there is no driver, no such GPU, no cuBLASLt, or where the binary was
    /// built without kernels or with kernels that the GPU cannot run.
    pub fn open(ordinal: usize) -> Result<CudaDevice> {
        let place = format!("cuda:{ordinal}");
        let error = |reason: &dyn ToString| device_error(&place, reason.to_string());
        let image = image().map_err(|reason| error(&reason))?;
        let count = num_devices()?;
        if ordinal >= count {
            return Err(error(&format!("there are {count} GPUs, numbered from 0")));
        }
        // SAFETY: it only looks for the library.
        if !unsafe { blas_sys::is_culib_present() } {
            return Err(error(
                &"cuBLASLt was not found (libcublasLt.so); install the CUDA libraries, or add \
                  their folder to LD_LIBRARY_PATH",
            ));
        }
        let of_driver = |reason: DriverError| device_error(&place, reason);
        let mut version = 0;
        // SAFETY: the driver writes one number.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(of_driver)?;
        if version < CUDA_VERSION {
            let name = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
            let (has, needs) = (name(version), name(CUDA_VERSION));
            return Err(error(&format!(
                "its driver is for CUDA {has}, this binary needs one for CUDA {needs} (580 or later)"
            )));
        }
        let context = CudaContext::new(ordinal).map_err(of_driver)?;
        let stream = context.new_stream().map_err(of_driver)?;
        let copies = context.new_stream().map_err(of_driver)?;
        let attribute = |which| context.attribute(which).map_err(of_driver);
        use sys::CUdevice_attribute as Of;
        let num_processors = attribute(Of::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let max_shared = attribute(Of::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let major = attribute(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        // SAFETY: the image is a fat binary, aligned, that lives until it is loaded.
        let module = unsafe { driver::module::load_data(image.as_ptr().cast()) };
        let module = module.map_err(|reason| {
            error(&format!(
                "the kernels cannot be loaded ({reason}): they need compute capability 8.0 or later"
            ))
        })?;
        let mut device = CudaDevice {
            name: format!("{place} ({})", context.name().map_err(of_driver)?),
            num_processors: num_processors as usize,
            max_shared_bytes: max_shared as usize,
            // Later devices run the PTX of all architectures, which has no such kernels.
            has_warpgroups: major == 9,
            stream,
            uploads: Mutex::new(Pinned::new(STAGED_BYTES).map_err(of_driver)?),
            copies,
            uploads_beside: Mutex::new(Pinned::new(STAGED_BYTES_BESIDE).map_err(of_driver)?),
            pool: memory_pool(ordinal).map_err(of_driver)?,
            module,
            functions: Mutex::new(HashMap::new()),
            blas: None,
            workspace: 0,
            context,
        };
        device.workspace = device.take(WORKSPACE_BYTES).map_err(of_driver)?;
        let blas = Blas::new(device.workspace).map_err(|reason| error(&reason))?;
        device.blas = Some(blas);
        Ok(device)
    }

    /// Memory that the stream finds taken whatever it does next.
    fn take(&self, bytes: usize) -> std::result::Result<sys::CUdeviceptr, DriverError> {
        let take = || {
            let mut memory = 0;
            let stream = self.copies.cu_stream();
            // SAFETY: the pool is ours, and the backend frees what it gave.
            let taken = unsafe {
                sys::cuMemAllocFromPoolAsync(&raw mut memory, bytes, self.pool, stream).result()
            };
            taken.map(|()| memory)
        };
        let memory = match take() {
            Err(OUT_OF_MEMORY) => {
                // What was freed may still be in use, or in pieces that the pool has not given back.
                // SAFETY: the streams and the pool are ours.
                unsafe {
                    driver::stream::synchronize(self.stream.cu_stream())?;
                    driver::stream::synchronize(self.copies.cu_stream())?;
                    sys::cuMemPoolTrimTo(self.pool, 0).result()?;
                }
                take()?
            }
            taken => taken?,
        };
        self.stream_waits_for_copies()?;
        Ok(memory)
    }

    /// A number that the pool tells.
    fn of_pool(
        &self,
        attribute: sys::CUmemPool_attribute,
    ) -> std::result::Result<u64, DriverError> {
        let mut value = 0u64;
        // SAFETY: the attributes that are asked for are u64.
        unsafe {
            sys::cuMemPoolGetAttribute(self.pool, attribute, (&raw mut value).cast()).result()?;
        }
        Ok(value)
    }

    fn stream_waits_for_copies(&self) -> std::result::Result<(), DriverError> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        let event = driver::event::create(flags)?;
        // SAFETY: the event was just created; the driver keeps it until it has happened.
        unsafe {
            let waited = driver::event::record(event, self.copies.cu_stream())
                .and_then(|()| driver::stream::wait_event(self.stream.cu_stream(), event, wait));
            driver::event::destroy(event).and(waited)
        }
    }

    fn error(&self, reason: impl ToString) -> Error {
        device_error(&self.name, reason)
    }

    fn blas(&self) -> &Blas {
        self.blas.as_ref().expect("an open device has it")
    }

    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| self.error(error))
    }

    fn function(&self, name: &'static str) -> Result<Function> {
        let mut functions = self.functions.lock().expect("no holder panics");
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let c_name = std::ffi::CString::new(name).expect("names of kernels hold no zero");
        // SAFETY: the module is loaded as long as the device is open.
        let function = unsafe { driver::module::get_function(self.module, c_name) };
        let function = function.map_err(|error| self.error(format!("kernel {name}: {error}")))?;
        use sys::CUfunction_attribute_enum as Of;
        // SAFETY: the function was just found.
        let set = unsafe {
            let own = Of::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            driver::function::get_function_attribute(function, own).and_then(|own| {
                let most = self.max_shared_bytes as i32 - own;
                let dynamic = Of::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                driver::function::set_function_attribute(function, dynamic, most)
            })
        };
        set.map_err(|error| self.error(format!("kernel {name}: {error}")))?;
        functions.insert(name, Function(function));
        Ok(Function(function))
    }
}

/// A pool of a device's memory that keeps what was freed for what is taken next, and makes no stream
/// wait for another.
fn memory_pool(ordinal: usize) -> std::result::Result<sys::CUmemoryPool, DriverError> {
    use sys::CUmemPool_attribute as Of;
    let (mut pool, mut kept, mut waits) = (std::ptr::null_mut(), u64::MAX, 0i32);
    // SAFETY: zeros are a description of no pool, which is then made one of plain memory of the
    // device; the attributes are a u64 and an int.
    unsafe {
        let mut wanted: sys::CUmemPoolProps = std::mem::zeroed();
        wanted.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        wanted.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        wanted.location.id = ordinal as i32;
        sys::cuMemPoolCreate(&raw mut pool, &raw const wanted).result()?;
        let threshold = Of::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut kept).cast()).result()?;
        let dependencies = Of::CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES;
        sys::cuMemPoolSetAttribute(pool, dependencies, (&raw mut waits).cast()).result()?;
    }
    Ok(pool)
}

/// The fat binary, aligned.
fn image() -> std::result::Result<Vec<u64>, String> {
    let bytes = match std::env::var_os(KERNELS_VARIABLE) {
        Some(path) => {
            let wrong = |reason: &dyn ToString| {
                format!("{KERNELS_VARIABLE}={}: {}", path.display(), reason.to_string())
            };
            let bytes = std::fs::read(&path).map_err(|error| wrong(&error))?;
            check_fat_binary(&bytes).map_err(|reason| wrong(&reason))?;
            bytes
        }
        None => KERNELS.to_vec(),
    };
    if bytes.is_empty() {
        let reason = "this binary was built without nvcc and has no kernels; set NVCC or CUDA_HOME \
                      and build it again";
        return Err(reason.into());
    }
    let mut image = vec![0u64; bytes.len().div_ceil(8) + 1];
    bytemuck::cast_slice_mut(&mut image)[..bytes.len()].copy_from_slice(&bytes);
    Ok(image)
}

/// Whether bytes are a whole fat binary: its magic number, and as many bytes as its header says. The
/// driver would read beyond the end of a file that was cut short.
fn check_fat_binary(bytes: &[u8]) -> std::result::Result<(), &'static str> {
    const MAGIC: u32 = 0xba55_ed50;
    // Magic number, version (16 bits), bytes of the header (16 bits), bytes behind it.
    let header = bytes.first_chunk::<16>().ok_or("it is too short for a fat binary")?;
    let [m0, m1, m2, m3, _, _, h0, h1, behind @ ..] = *header;
    if u32::from_le_bytes([m0, m1, m2, m3]) != MAGIC {
        return Err("it is no fat binary; compile it with nvcc -fatbin");
    }
    let len = u64::from_le_bytes(behind).checked_add(u16::from_le_bytes([h0, h1]).into());
    match len.is_some_and(|len| len <= bytes.len() as u64) {
        true => Ok(()),
        false => Err("the fat binary is cut short"),
    }
}

impl Driver for CudaDevice {
    type Graph = Graph;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn product_library(&self) -> String {
        format!("cuBLASLt {}", blas::loaded_version())
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
        self.bind()?;
        use sys::CUmemPool_attribute as Of;
        let free = driver::mem_get_info().and_then(|(free, _)| {
            // What the pool holds back is free as well.
            let reserved = self.of_pool(Of::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
            let used = self.of_pool(Of::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
            Ok(free + reserved.saturating_sub(used) as usize)
        });
        free.map_err(|error| self.error(error))
    }

    fn allocate(&self, bytes: usize, _name: &str) -> Result<Option<u64>> {
        self.bind()?;
        match self.take(bytes) {
            Ok(memory) => Ok(Some(memory)),
            Err(OUT_OF_MEMORY) => Ok(None),
            Err(error) => Err(self.error(error)),
        }
    }

    fn free(&self, address: Address, _bytes: usize) {
        // What cannot be freed was lost with its context.
        if self.bind().is_ok() {
            // SAFETY: it was allocated here, and the stream is behind all that uses it.
            let _ = unsafe { driver::free_async(address.get(), self.stream.cu_stream()) };
        }
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        let mut uploads = self.uploads.lock().expect("no holder panics");
        let copied = uploads.upload(to, bytes, self.stream.cu_stream());
        copied.map_err(|error| self.error(error))
    }

    fn upload_beside(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        let mut uploads = self.uploads_beside.lock().expect("no holder panics");
        let copied = uploads.upload(to, bytes, self.copies.cu_stream());
        copied.and_then(|()| self.stream_waits_for_copies()).map_err(|error| self.error(error))
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: the backend allocated as much, and the copy is waited for.
        let copied = unsafe {
            driver::memcpy_dtoh_async(bytes, from.get(), stream)
                .and_then(|()| driver::stream::synchronize(stream))
        };
        copied.map_err(|error| self.error(error))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.bind()?;
        let function = self.function(launch.kernel())?;
        let [x, y, z] = launch.grid();
        let mut params = [launch.params().as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the one parameter is the struct that the kernel takes, which the emulator's tests
        // hold to its size, and its addresses are the backend's. The driver copies it.
        let launched = unsafe {
            driver::launch_kernel(
                function.0,
                (x, y, z),
                (launch.threads(), 1, 1),
                launch.shared_bytes() as u32,
                self.stream.cu_stream(),
                &mut params,
            )
        };
        launched.map_err(|error| self.error(format!("kernel {}: {error}", launch.kernel())))
    }

    fn multiply(&self, product: &Product) -> Result<Outcome> {
        self.bind()?;
        Ok(self.blas().multiply(product, self.stream.cu_stream()))
    }

    fn begin_capture(&self) -> Result<()> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours, and nothing but launches and products follows.
        let begun = unsafe { driver::stream::begin_capture(self.stream.cu_stream(), mode) };
        begun.map_err(|error| self.error(error))?;
        self.blas().begin_capture();
        Ok(())
    }

    fn end_capture(&self) -> Result<Option<Graph>> {
        let plans = self.blas().end_capture();
        self.bind()?;
        // SAFETY: the capture was begun on this stream.
        let graph = unsafe { driver::stream::end_capture(self.stream.cu_stream()) };
        let graph = graph.map_err(|error| self.error(error))?;
        // SAFETY: the graph was just captured.
        let executable =
            unsafe { driver::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0)) };
        let ready = executable.and_then(|executable| {
            let context = Arc::clone(&self.context);
            let graph = Graph { graph, executable, context, _plans: plans };
            // It takes what it needs of the device now.
            // SAFETY: the graph was just made.
            unsafe { driver::graph::upload(executable, self.stream.cu_stream())? };
            Ok(graph)
        });
        match (executable, ready) {
            (_, Ok(graph)) => Ok(Some(graph)),
            (executable, Err(error)) => {
                if executable.is_err() {
                    // SAFETY: nobody else knows of it.
                    let _ = unsafe { driver::graph::destroy(graph) };
                }
                match error {
                    OUT_OF_MEMORY => Ok(None),
                    error => Err(self.error(error)),
                }
            }
        }
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        self.bind()?;
        // SAFETY: the memory that it refers to is where it was: the backend drops graphs when it
        // moves.
        let launched = unsafe { driver::graph::launch(graph.executable, self.stream.cu_stream()) };
        launched.map_err(|error| self.error(error))
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: all of it is ours, and nobody asks for anything any more; errors here have
        // nowhere to go.
        unsafe {
            for stream in [&self.copies, &self.stream] {
                let _ = driver::stream::synchronize(stream.cu_stream());
            }
            drop(self.blas.take());
            if self.workspace != 0 {
                let _ = driver::free_async(self.workspace, self.stream.cu_stream());
                let _ = driver::stream::synchronize(self.stream.cu_stream());
            }
            let _ = sys::cuMemPoolDestroy(self.pool);
            let _ = driver::module::unload(self.module);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fat_binary_that_is_cut_short_or_none_is_refused() {
        let mut whole = 0xba55_ed50u32.to_le_bytes().to_vec();
        whole.extend([1, 0, 16, 0]);
        whole.extend(40u64.to_le_bytes());
        whole.extend([7; 40]);
        assert_eq!(check_fat_binary(&whole), Ok(()));
        for len in 0..whole.len() {
            assert!(check_fat_binary(&whole[..len]).is_err(), "{len} bytes");
        }
        whole[0] ^= 1;
        assert!(check_fat_binary(&whole).is_err());
        if !KERNELS.is_empty() {
            assert_eq!(check_fat_binary(KERNELS), Ok(()));
        }
    }
}
