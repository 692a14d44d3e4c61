//! Matrix products by cuBLASLt. The plan of a product (its descriptors and algorithm) is made once
//! for each shape, outside captures: a heuristic that is asked in a capture may fail.
#![allow(unsafe_code)] // the library's interface

use std::ffi::c_void;
use std::mem::size_of_val;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::{CUdeviceptr, CUstream};

use super::driver::{Address, FusedActivation, Outcome, Product};
use super::plans::Plans;
use crate::tensor::Dtype;

/// What cuBLASLt may use; NVIDIA's advice for Hopper.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
/// Plans that are kept, the latest used: prompts have any number of rows. Those that live graphs
/// were captured with are kept beside.
const MAX_PLANS: usize = 4096;
/// The oldest version of cuBLASLt that may be used, as `cublasLtGetVersion` counts: bindings are for
/// this major version.
const MIN_VERSION: usize = 130_000;
/// `CUBLAS_OP_T`
const TRANSPOSED: i32 = 1;
/// Partial sums are added up in f32, or there are none: never in the type of the result.
const REDUCTIONS: u32 =
    sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

type BlasResult<T> = Result<T, CublasError>;

/// cuBLASLt, and the plans of the products that were asked for.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CUdeviceptr,
    /// None where the library refused the shape.
    plans: Mutex<Plans<Shape, Option<Plan>>>,
    /// The plans that the capture under way has used, if there is one.
    captured: Mutex<Option<CapturedPlans>>,
}

/// Plans that a graph was captured with. As long as they are held, they are not evicted.
pub(super) type CapturedPlans = Vec<Arc<Option<Plan>>>;

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

pub(super) struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: handles of the library may be used by any thread, and one at a time does: plans are behind
// a lock, or held by a graph that only keeps them.
unsafe impl Send for Plan {}
// SAFETY: a plan is only read, but for its bias, which is set under the lock of all plans.
unsafe impl Sync for Plan {}

impl Blas {
    /// `workspace`: device memory of [`WORKSPACE_BYTES`] that products may use one after the other.
    ///
    /// # Errors
    /// What is wrong with the library.
    pub fn new(workspace: CUdeviceptr) -> Result<Blas, String> {
        let version = version();
        if version < MIN_VERSION {
            return Err(format!(
                "cuBLASLt {} was found, but {} or later is needed; install the libraries of CUDA 13 \
                 and put their folder first in LD_LIBRARY_PATH",
                version_name(version),
                version_name(MIN_VERSION)
            ));
        }
        let handle = result::create_handle().map_err(|error| format!("cuBLASLt: {error:?}"))?;
        let plans = Mutex::new(Plans::new(MAX_PLANS));
        Ok(Blas { handle, workspace, plans, captured: Mutex::new(None) })
    }

    /// Keeps the plans that products use from now on, until the capture ends.
    pub fn begin_capture(&self) {
        *self.captured.lock().expect("no holder panics") = Some(Vec::new());
    }

    /// The plans that products have used since the capture began.
    pub fn end_capture(&self) -> CapturedPlans {
        self.captured.lock().expect("no holder panics").take().unwrap_or_default()
    }

    /// Enqueues a product, where the library can. A shape that it refused, for whatever reason, is
    /// not asked for again.
    pub fn multiply(&self, product: &Product, stream: CUstream) -> Outcome {
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
        let mut plans = self.plans.lock().expect("no holder panics");
        let mut captured = self.captured.lock().expect("no holder panics");
        let plan = match (plans.get(&shape), &*captured) {
            (Some(plan), _) => plan,
            (None, Some(_)) => return Outcome::Unplanned,
            (None, None) => plans.insert(shape, self.plan(&shape, product.bias).ok()),
        };
        let Some(of_shape) = &*plan else { return Outcome::Refused };
        if self.enqueue(of_shape, product, stream).is_err() {
            plans.insert(shape, None);
            // The capture may be void: the step is run eagerly, where a kernel does the product.
            return if captured.is_some() { Outcome::Unplanned } else { Outcome::Refused };
        }
        if let Some(captured) = &mut *captured {
            captured.push(plan);
        }
        Outcome::Done
    }

    fn enqueue(&self, plan: &Plan, product: &Product, stream: CUstream) -> BlasResult<()> {
        set_bias(plan.operation, product.bias)?;
        let (one, beta) = (1f32, if product.adds { 1f32 } else { 0f32 });
        let out = product.out.get() as *mut c_void;
        // SAFETY: the backend's addresses hold matrices of the shapes it says.
        unsafe {
            result::matmul(
                self.handle,
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
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
    }

    fn plan(&self, shape: &Shape, bias: Option<Address>) -> BlasResult<Plan> {
        let (rows, columns, inner) = (shape.rows as u64, shape.columns as u64, shape.inner as u64);
        let (dtype, out_dtype) = (data_type(shape.dtype), data_type(shape.out_dtype));
        // Column by column, as cuBLASLt counts, the product is weightᵀ x with `columns` rows.
        let weight = result::create_matrix_layout(dtype, inner, columns, inner as i64)?;
        let x = result::create_matrix_layout(dtype, inner, rows, inner as i64)?;
        let out = result::create_matrix_layout(out_dtype, columns, rows, shape.stride as i64)?;
        let operation = result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )?;
        // From here on it is destroyed with the plan.
        // SAFETY: an algorithm is plain numbers, and this one is used by nobody.
        let algorithm = unsafe { std::mem::zeroed() };
        let mut plan = Plan { operation, weight, x, out, algorithm };
        use sys::cublasLtMatmulDescAttributes_t as Of;
        set(operation, Of::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        set(operation, Of::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue(shape))?;
        set_bias(operation, bias)?;
        let preference = result::create_matmul_pref()?;
        let found = self.find(&plan, preference, shape);
        // SAFETY: it is ours.
        unsafe { result::destroy_matmul_pref(preference)? };
        plan.algorithm = found?;
        Ok(plan)
    }

    /// The algorithm that the library thinks the fastest.
    fn find(
        &self,
        plan: &Plan,
        preference: sys::cublasLtMatmulPreference_t,
        shape: &Shape,
    ) -> BlasResult<sys::cublasLtMatmulAlgo_t> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Prefers;
        let prefer = |attribute, value: *const c_void, bytes| {
            // SAFETY: the preference is alive, and the value has the attribute's size.
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value, bytes) }
        };
        let workspace = Prefers::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        prefer(workspace, std::ptr::from_ref(&WORKSPACE_BYTES).cast(), size_of::<usize>())?;
        let [of_weight, of_x, of_out] = &shape.alignments;
        for (attribute, value) in [
            (Prefers::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &REDUCTIONS),
            (Prefers::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, of_weight),
            (Prefers::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, of_x),
            (Prefers::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, of_out),
            (Prefers::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, of_out),
        ] {
            prefer(attribute, std::ptr::from_ref(value).cast(), size_of::<u32>())?;
        }
        // SAFETY: all of them are alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle,
                plan.operation,
                plan.weight,
                plan.x,
                plan.out,
                plan.out,
                preference,
            )
        };
        found.map(|found| found.algo)
    }
}

/// The version of the library that was loaded, as it counts: 130100 is 13.1.0.
fn version() -> usize {
    // SAFETY: it takes nothing and returns a number.
    unsafe { sys::cublasLtGetVersion() }
}

/// The version of the library that was loaded, as people write it.
pub(super) fn loaded_version() -> String {
    version_name(version())
}

fn version_name(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

impl Drop for Blas {
    /// Its context must be current, and nothing may use it any more.
    fn drop(&mut self) {
        // SAFETY: it is ours; errors here have nowhere to go.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: all of it is ours; errors here have nowhere to go.
        unsafe {
            let _ = result::destroy_matmul_desc(self.operation);
            for layout in [self.weight, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

fn set<T>(
    operation: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> BlasResult<()> {
    let at = std::ptr::from_ref(value).cast();
    // SAFETY: the operation is alive, and the value has the attribute's type.
    unsafe { result::set_matmul_desc_attribute(operation, attribute, at, size_of_val(value)) }
}

fn set_bias(operation: sys::cublasLtMatmulDesc_t, bias: Option<Address>) -> BlasResult<()> {
    let Some(bias) = bias else { return Ok(()) };
    let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
    set(operation, attribute, &bias.get())
}

fn data_type(dtype: Dtype) -> sys::cudaDataType_t {
    match dtype {
        Dtype::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Dtype::F16 => sys::cudaDataType_t::CUDA_R_16F,
        Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        Dtype::Int8 => sys::cudaDataType_t::CUDA_R_8I,
    }
}

fn epilogue(shape: &Shape) -> sys::cublasLtEpilogue_t {
    use sys::cublasLtEpilogue_t as Is;
    match (shape.activation, shape.has_bias) {
        (None, false) => Is::CUBLASLT_EPILOGUE_DEFAULT,
        (None, true) => Is::CUBLASLT_EPILOGUE_BIAS,
        (Some(FusedActivation::Relu), false) => Is::CUBLASLT_EPILOGUE_RELU,
        (Some(FusedActivation::Relu), true) => Is::CUBLASLT_EPILOGUE_RELU_BIAS,
        (Some(FusedActivation::GeluTanh), false) => Is::CUBLASLT_EPILOGUE_GELU,
        (Some(FusedActivation::GeluTanh), true) => Is::CUBLASLT_EPILOGUE_GELU_BIAS,
    }
}
