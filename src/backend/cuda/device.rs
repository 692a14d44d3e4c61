//! NVIDIA GPUs, by cudarc: one stream, kernels from the fat binary that `build.rs` made, matrix
//! products by cuBLASLt with plans that are kept, recorded steps as CUDA graphs.
//!
//! Libraries are opened when they are first used, so a binary with this feature starts on a machine
//! without a driver, and says so when it is asked for a device.
#![allow(unsafe_code)] // the driver's interface

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::mem::size_of_val;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::result as blas;
use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys as blas_sys;
use cudarc::driver::result as driver;
use cudarc::driver::sys;
use cudarc::driver::{CudaContext, CudaStream, DriverError};

use super::driver::{Address, Driver, FusedActivation, Launch, Product};
use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// The kernels, or nothing where there was no nvcc to compile them.
static KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));
/// Names a fat binary to use instead of the one that is built in.
const KERNELS_VARIABLE: &str = "SIDEREAL_KERNELS";
/// What cuBLASLt may use; NVIDIA's advice for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// `CUBLAS_OP_T`
const TRANSPOSED: i32 = 1;

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
pub struct CudaDevice {
    name: String,
    num_processors: usize,
    /// Shared memory that a block may have.
    max_shared_bytes: usize,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// For copies beside it.
    copies: Arc<CudaStream>,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static str, Function>>,
    blas: Blas,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: handles of the driver may be used by any thread that has bound their context, which
// every method does first.
unsafe impl Send for CudaDevice {}
// SAFETY: the same; what is changed is behind locks.
unsafe impl Sync for CudaDevice {}

/// cuBLASLt, and the plans of the products that were asked for.
struct Blas {
    handle: blas_sys::cublasLtHandle_t,
    workspace: sys::CUdeviceptr,
    plans: Mutex<HashMap<Shape, Plan>>,
}

/// What a plan depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    columns: usize,
    inner: usize,
    stride: usize,
    dtype: Dtype,
    out_dtype: Dtype,
    adds: bool,
    activation: Option<FusedActivation>,
    has_bias: bool,
    /// Of the weight, `x` and `out`.
    alignments: [u32; 3],
}

struct Plan {
    operation: blas_sys::cublasLtMatmulDesc_t,
    weight: blas_sys::cublasLtMatrixLayout_t,
    x: blas_sys::cublasLtMatrixLayout_t,
    out: blas_sys::cublasLtMatrixLayout_t,
    algorithm: blas_sys::cublasLtMatmulAlgo_t,
}

/// A CUDA graph.
pub struct Graph {
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
    context: Arc<CudaContext>,
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
        let context = CudaContext::new(ordinal).map_err(of_driver)?;
        let stream = context.new_stream().map_err(of_driver)?;
        let copies = context.new_stream().map_err(of_driver)?;
        let attribute = |which| context.attribute(which).map_err(of_driver);
        use sys::CUdevice_attribute as Of;
        let num_processors = attribute(Of::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let max_shared = attribute(Of::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let image = image().map_err(|reason| error(&reason))?;
        // SAFETY: the image is a fat binary, aligned, that lives until it is loaded.
        let module = unsafe { driver::module::load_data(image.as_ptr().cast()) };
        let module = module.map_err(|reason| {
            error(&format!(
                "its kernels cannot be loaded ({reason}): they need compute capability 8.0"
            ))
        })?;
        let handle = blas::create_handle().map_err(|reason| error(&format!("{reason:?}")))?;
        // SAFETY: it is freed when the device is dropped.
        let workspace = unsafe { driver::malloc_sync(WORKSPACE_BYTES) }.map_err(of_driver)?;
        Ok(CudaDevice {
            name: format!("{place} ({})", context.name().map_err(of_driver)?),
            num_processors: num_processors as usize,
            max_shared_bytes: max_shared as usize,
            stream,
            copies,
            module,
            functions: Mutex::new(HashMap::new()),
            blas: Blas { handle, workspace, plans: Mutex::new(HashMap::new()) },
            context,
        })
    }

    fn error(&self, reason: impl ToString) -> Error {
        device_error(&self.name, reason)
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

    fn plan(&self, shape: &Shape) -> std::result::Result<Plan, CublasError> {
        let (rows, columns, inner) = (shape.rows as u64, shape.columns as u64, shape.inner as u64);
        let (dtype, out_dtype) = (data_type(shape.dtype), data_type(shape.out_dtype));
        // Column by column, as cuBLASLt counts, the product is weightᵀ x with `columns` rows.
        let weight = blas::create_matrix_layout(dtype, inner, columns, inner as i64)?;
        let x = blas::create_matrix_layout(dtype, inner, rows, inner as i64)?;
        let out = blas::create_matrix_layout(out_dtype, columns, rows, shape.stride as i64)?;
        let operation = blas::create_matmul_desc(
            blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            blas_sys::cudaDataType_t::CUDA_R_32F,
        )?;
        use blas_sys::cublasLtMatmulDescAttributes_t as Of;
        set(operation, Of::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        set(operation, Of::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue(shape))?;
        let preference = blas::create_matmul_pref()?;
        use blas_sys::cublasLtMatmulPreferenceAttributes_t as Prefers;
        let prefer = |attribute, value: *const c_void, bytes| {
            // SAFETY: the preference is alive, and the value has the attribute's size.
            unsafe { blas::set_matmul_pref_attribute(preference, attribute, value, bytes) }
        };
        let workspace = Prefers::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        prefer(workspace, std::ptr::from_ref(&WORKSPACE_BYTES).cast(), size_of::<usize>())?;
        let [of_weight, of_x, of_out] = &shape.alignments;
        for (attribute, alignment) in [
            (Prefers::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, of_weight),
            (Prefers::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, of_x),
            (Prefers::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, of_out),
            (Prefers::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, of_out),
        ] {
            prefer(attribute, std::ptr::from_ref(alignment).cast(), size_of::<u32>())?;
        }
        // SAFETY: all of them are alive.
        let heuristic = unsafe {
            let found = blas::get_matmul_algo_heuristic(
                self.blas.handle,
                operation,
                weight,
                x,
                out,
                out,
                preference,
            );
            blas::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(Plan { operation, weight, x, out, algorithm: heuristic.algo })
    }

    fn multiply_as_planned(&self, product: &Product) -> std::result::Result<(), CublasError> {
        let alignment = |address: Address| 1 << address.get().trailing_zeros().min(8);
        let shape = Shape {
            rows: product.rows,
            columns: product.columns,
            inner: product.inner,
            stride: product.stride,
            dtype: product.dtype,
            out_dtype: product.out_dtype,
            adds: product.adds,
            activation: product.activation,
            has_bias: product.bias.is_some(),
            alignments: [product.weight, product.x, product.out].map(alignment),
        };
        let mut plans = self.blas.plans.lock().expect("no holder panics");
        let plan = match plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(self.plan(&shape)?),
        };
        if let Some(bias) = product.bias {
            let attribute =
                blas_sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set(plan.operation, attribute, &bias.get())?;
        }
        let (one, beta) = (1f32, if product.adds { 1f32 } else { 0f32 });
        let out = product.out.get() as *mut c_void;
        // SAFETY: the backend's addresses hold matrices of the shapes it says.
        unsafe {
            blas::matmul(
                self.blas.handle,
                plan.operation,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                product.weight.get() as *const c_void,
                plan.weight,
                product.x.get() as *const c_void,
                plan.x,
                out,
                plan.out,
                out,
                plan.out,
                &raw const plan.algorithm,
                self.blas.workspace as *mut c_void,
                WORKSPACE_BYTES,
                self.stream.cu_stream().cast(),
            )
        }
    }
}

fn set<T>(
    operation: blas_sys::cublasLtMatmulDesc_t,
    attribute: blas_sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> std::result::Result<(), CublasError> {
    // SAFETY: the operation is alive, and the value has the attribute's type.
    unsafe {
        blas::set_matmul_desc_attribute(
            operation,
            attribute,
            std::ptr::from_ref(value).cast(),
            size_of_val(value),
        )
    }
}

fn data_type(dtype: Dtype) -> blas_sys::cudaDataType_t {
    match dtype {
        Dtype::F32 => blas_sys::cudaDataType_t::CUDA_R_32F,
        Dtype::F16 => blas_sys::cudaDataType_t::CUDA_R_16F,
        Dtype::Bf16 => blas_sys::cudaDataType_t::CUDA_R_16BF,
    }
}

fn epilogue(shape: &Shape) -> blas_sys::cublasLtEpilogue_t {
    use blas_sys::cublasLtEpilogue_t as Is;
    match (shape.activation, shape.has_bias) {
        (None, false) => Is::CUBLASLT_EPILOGUE_DEFAULT,
        (None, true) => Is::CUBLASLT_EPILOGUE_BIAS,
        (Some(FusedActivation::Relu), false) => Is::CUBLASLT_EPILOGUE_RELU,
        (Some(FusedActivation::Relu), true) => Is::CUBLASLT_EPILOGUE_RELU_BIAS,
        (Some(FusedActivation::GeluTanh), false) => Is::CUBLASLT_EPILOGUE_GELU,
        (Some(FusedActivation::GeluTanh), true) => Is::CUBLASLT_EPILOGUE_GELU_BIAS,
    }
}

/// The fat binary, aligned.
fn image() -> std::result::Result<Vec<u64>, String> {
    let bytes = match std::env::var_os(KERNELS_VARIABLE) {
        Some(path) => std::fs::read(&path)
            .map_err(|error| format!("{KERNELS_VARIABLE}={}: {error}", path.display()))?,
        None => KERNELS.to_vec(),
    };
    if bytes.is_empty() {
        return Err(
            "this binary was built without nvcc and has no kernels; set NVCC or CUDA_HOME \
                    and build it again"
                .into(),
        );
    }
    let mut image = vec![0u64; bytes.len().div_ceil(8) + 1];
    bytemuck::cast_slice_mut(&mut image)[..bytes.len()].copy_from_slice(&bytes);
    Ok(image)
}

impl Driver for CudaDevice {
    type Recording = Graph;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn num_processors(&self) -> usize {
        self.num_processors
    }

    fn allocate(&self, bytes: usize, name: &str) -> Result<u64> {
        self.bind()?;
        // SAFETY: the backend frees it.
        let memory = unsafe { driver::malloc_sync(bytes) };
        memory.map_err(|error| {
            let free = driver::mem_get_info().map_or(0, |(free, _)| free);
            self.error(format!("{bytes} bytes for {name}, of which {free} are free: {error}"))
        })
    }

    fn free(&self, address: Address, _bytes: usize) {
        // What cannot be freed was lost with its context.
        if self.bind().is_ok() {
            // SAFETY: it was allocated here, and the driver waits for what still uses it.
            let _ = unsafe { driver::free_sync(address.get()) };
        }
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: the backend allocated as much. The bytes are in pageable memory, which the driver
        // has copied when the call returns.
        let copied = unsafe { driver::memcpy_htod_async(to.get(), bytes, stream) };
        copied.map_err(|error| self.error(error))
    }

    fn upload_beside(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as in `upload`; the driver keeps the event until it has happened.
        let copied = unsafe {
            driver::memcpy_htod_async(to.get(), bytes, self.copies.cu_stream()).and_then(|()| {
                let event = driver::event::create(flags)?;
                let waited = driver::event::record(event, self.copies.cu_stream()).and_then(|()| {
                    driver::stream::wait_event(self.stream.cu_stream(), event, wait)
                });
                driver::event::destroy(event).and(waited)
            })
        };
        copied.map_err(|error| self.error(error))
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

    fn multiply(&self, product: &Product) -> Result<()> {
        self.bind()?;
        let multiplied = self.multiply_as_planned(product);
        multiplied.map_err(|error| self.error(format!("{product:?}: {error:?}")))
    }

    fn begin_recording(&self) -> Result<()> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours, and nothing but launches and products follows.
        let begun = unsafe { driver::stream::begin_capture(self.stream.cu_stream(), mode) };
        begun.map_err(|error| self.error(error))
    }

    fn end_recording(&self) -> Result<Graph> {
        self.bind()?;
        // SAFETY: the capture was begun on this stream.
        let graph = unsafe { driver::stream::end_capture(self.stream.cu_stream()) };
        let graph = graph.map_err(|error| self.error(error))?;
        // SAFETY: the graph was just captured.
        let executable =
            unsafe { driver::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0)) };
        match executable {
            Ok(executable) => Ok(Graph { graph, executable, context: Arc::clone(&self.context) }),
            Err(error) => {
                // SAFETY: nobody else knows of it.
                let _ = unsafe { driver::graph::destroy(graph) };
                Err(self.error(error))
            }
        }
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        self.bind()?;
        // SAFETY: the memory that it refers to is where it was: the backend forgets recordings when
        // it moves.
        let launched = unsafe { driver::graph::launch(graph.executable, self.stream.cu_stream()) };
        launched.map_err(|error| self.error(error))
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        let plans = self.blas.plans.get_mut().expect("no holder panics");
        // SAFETY: all of it is ours, and nobody asks for anything any more; errors here have
        // nowhere to go.
        unsafe {
            let _ = driver::stream::synchronize(self.stream.cu_stream());
            for plan in plans.values() {
                let _ = blas::destroy_matmul_desc(plan.operation);
                for layout in [plan.weight, plan.x, plan.out] {
                    let _ = blas::destroy_matrix_layout(layout);
                }
            }
            let _ = blas::destroy_handle(self.blas.handle);
            let _ = driver::free_sync(self.blas.workspace);
            let _ = driver::module::unload(self.module);
        }
    }
}
