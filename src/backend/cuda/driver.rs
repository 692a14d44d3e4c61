//! What the backend asks of a device.

use crate::error::Result;
use crate::tensor::Dtype;

/// A place in a device's memory, or none. Only the backend makes them, of what
/// [`allocate`](Driver::allocate) gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub(super) u64);

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

/// A device. What it is asked for happens in that order, and need not have happened when a call
/// returns, but for [`download`](Driver::download).
pub trait Driver: Send + Sync + 'static {
    /// Captured launches and products, which can be replayed.
    type Graph: Send;

    /// The device's name.
    fn name(&self) -> String;
    /// The library of matrix products and its version.
    fn product_library(&self) -> String;
    /// Multiprocessors: each runs a block of threads or a few at a time.
    fn num_processors(&self) -> usize;
    /// Shared memory that a block may have, in bytes.
    fn max_shared_bytes(&self) -> usize;
    /// Whether it runs the kernels that multiply by warpgroups: those of compute capability 9.0.
    fn has_warpgroups(&self) -> bool;
    /// Memory that nobody has taken, in bytes.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device), as for all that follow.
    fn free_bytes(&self) -> Result<usize>;
    /// Memory of so many bytes, aligned to 256, which the backend frees, or none where the device
    /// has not so much; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn allocate(&self, bytes: usize, name: &str) -> Result<Option<u64>>;
    /// Takes memory back once all that was asked for has happened.
    fn free(&self, address: Address, bytes: usize);
    /// Copies to the device; `bytes` are read before the call returns.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()>;
    /// Copies to memory that nothing uses yet, beside what was asked for before; what is asked for
    /// after it finds the copy. `bytes` are read before the call returns.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn upload_beside(&self, to: Address, bytes: &[u8]) -> Result<()>;
    /// Waits for everything, then copies from the device.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()>;
    /// Runs a kernel.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;
    /// Multiplies, where the device's library can.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the device failed.
    fn multiply(&self, product: &Product) -> Result<Outcome>;
    /// From now on launches and products are captured and not done.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device): nothing is captured then.
    fn begin_capture(&self) -> Result<()>;
    /// Ends the capture that was begun and returns its graph, or none where there is no memory for
    /// it.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device): the capture has ended without a graph.
    fn end_capture(&self) -> Result<Option<Self::Graph>>;
    /// Enqueues the launches and products of a graph.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn replay(&self, graph: &Self::Graph) -> Result<()>;
}

/// What became of a product that a device was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is enqueued or captured.
    Done,
    /// The library has nothing for it: a kernel must do it.
    Refused,
    /// It was asked for in a capture, and has no plan or failed: plans are made outside captures alone.
    Unplanned,
}

/// What a device was asked for so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Kernels launched one by one.
    pub launches: u64,
    /// Matrix products asked for one by one.
    pub products: u64,
    /// Products that the device's library refused, captured ones included: a kernel did them.
    pub refused_products: u64,
    /// Steps that were replays of graphs.
    pub replays: u64,
    /// Steps captured as graphs.
    pub captures: u64,
    /// Captures that made no graph: the steps were run eagerly.
    pub abandoned_captures: u64,
    /// Graphs dropped to make room for others.
    pub evicted_graphs: u64,
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
