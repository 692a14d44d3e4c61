//! Products by the tiles of AMX: 16 rows by 16 columns by 32 inputs in bf16, or 64 in 8 bits, an
//! instruction.
//!
//! The compiler's intrinsics for tiles are not stable, so the inner loop is assembly. A sum over 32
//! inputs is two chains of fused multiply-adds, over the even and the odd ones, which are added and
//! then added to the sum so far (TDPBF16PS, Intel 64 and IA-32 Architectures Software Developer's
//! Manual, volume 2); subnormal numbers count as zeros. Sums in 8 bits are whole numbers of 32 bits, whose
//! order changes nothing.
#![allow(unsafe_code)] // inline assembly

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::ops::Range;
use std::sync::OnceLock;

use super::f32::finish;
use super::packed_rows::{PackedProduct, scaled};
use super::panel::{Element, PANEL, Pair, Quad, ROWS_PER_BLOCK, WORDS_OF_TILE};

/// Rows of a tile.
pub const ROWS: usize = 16;
/// Tiles of rows that are summed at once, each with two tiles of columns.
const TILES: usize = 2;
/// Bytes from a word of inputs to the next in a panel, and from a row of sums to the next.
const PANEL_BYTES: usize = PANEL * size_of::<u32>();
const LINE: usize = 64;

/// Whether the processor has tiles for bf16 and for 8 bits and the system lets this process use them.
pub fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if __cpuid(0).eax < 7 {
            return false;
        }
        let all = 1 << 22 | 1 << 24 | 1 << 25; // AMX-BF16, AMX-TILE, AMX-INT8: no processor has but one
        let has_tiles = __cpuid_count(7, 0).edx & all == all;
        has_tiles && is_permitted()
    })
}

/// Asks Linux, which gives a process the large state of tiles on request only.
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call changes nothing but what instructions this process may use; a system that
    // does not know it returns an error.
    let result =
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
    result == 0
}

/// The shapes of the eight tiles.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_of_row: [u16; 16],
    rows: [u8; 16],
}

/// Whole tiles, all eight.
static WHOLE_TILES: Configuration = {
    let (mut bytes_of_row, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        (bytes_of_row[tile], rows[tile]) = (LINE as u16, ROWS as u8);
        tile += 1;
    }
    Configuration { palette: 1, start_row: 0, reserved: [0; 14], bytes_of_row, rows }
};

/// The sums of some tiles of rows with a panel, as their instructions leave them.
#[repr(C, align(64))]
pub struct Sums([[u32; PANEL]; TILES * ROWS]);

/// One or two tiles of rows, `x`, times a panel, by an instruction for the products of two tiles. Asks for
/// the lines of `ahead` meanwhile.
macro_rules! multiply {
    ($dot:literal, $x:ident, $words_of_row:ident, $panel:ident, $ahead:ident, $sums:ident) => {{
        let steps = $words_of_row / WORDS_OF_TILE;
        assert!(steps > 0 && $panel.len() >= $words_of_row * PANEL, "a panel of all inputs");
        let tile_len = ROWS * $words_of_row;
        let lines = (size_of_val($ahead) / LINE).div_ceil(steps).max(1);
        let (panel, ahead, sums) = ($panel.as_ptr(), $ahead.as_ptr(), $sums.0.as_mut_ptr());
        // SAFETY: the tiles are configured. In each of `steps` steps 16 lines are read of each tile of
        // `x`, and twice 16 lines of the panel, `PANEL_BYTES` apart; all are `steps` times as long, by
        // the assertion and the arms. `sums` has room for two tiles of rows. Lines that are asked for
        // need not exist.
        unsafe {
            match $x.len() / tile_len {
                1 => asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "2:",
                    "tileloadd tmm6, [{panel} + {panel_bytes}]",
                    "tileloadd tmm4, [{x} + {line_bytes}]",
                    concat!($dot, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{panel} + {panel_bytes} + 64]",
                    concat!($dot, " tmm1, tmm4, tmm7"),
                    "mov {left}, {lines}",
                    "3:",
                    "prefetcht1 [{ahead}]",
                    "add {ahead}, 64",
                    "dec {left}",
                    "jnz 3b",
                    "add {panel}, {step_bytes}",
                    "add {x}, {x_bytes}",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {panel_bytes}], tmm0",
                    "tilestored [{sums} + {panel_bytes} + 64], tmm1",
                    x = inout(reg) $x.as_ptr() => _,
                    panel = inout(reg) panel => _,
                    ahead = inout(reg) ahead => _,
                    steps = inout(reg) steps => _,
                    left = out(reg) _,
                    lines = in(reg) lines,
                    line_bytes = in(reg) LINE,
                    x_bytes = const ROWS * LINE,
                    panel_bytes = in(reg) PANEL_BYTES,
                    step_bytes = const WORDS_OF_TILE * PANEL_BYTES,
                    sums = in(reg) sums,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                ),
                2 => asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm6, [{panel} + {panel_bytes}]",
                    "tileloadd tmm4, [{x} + {line_bytes}]",
                    concat!($dot, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{panel} + {panel_bytes} + 64]",
                    concat!($dot, " tmm1, tmm4, tmm7"),
                    "tileloadd tmm5, [{lower} + {line_bytes}]",
                    concat!($dot, " tmm2, tmm5, tmm6"),
                    concat!($dot, " tmm3, tmm5, tmm7"),
                    "mov {left}, {lines}",
                    "3:",
                    "prefetcht1 [{ahead}]",
                    "add {ahead}, 64",
                    "dec {left}",
                    "jnz 3b",
                    "add {panel}, {step_bytes}",
                    "add {x}, {x_bytes}",
                    "add {lower}, {x_bytes}",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {panel_bytes}], tmm0",
                    "tilestored [{sums} + {panel_bytes} + 64], tmm1",
                    "add {sums}, {tile_bytes}",
                    "tilestored [{sums} + {panel_bytes}], tmm2",
                    "tilestored [{sums} + {panel_bytes} + 64], tmm3",
                    x = inout(reg) $x.as_ptr() => _,
                    lower = inout(reg) $x[tile_len..].as_ptr() => _,
                    panel = inout(reg) panel => _,
                    ahead = inout(reg) ahead => _,
                    steps = inout(reg) steps => _,
                    left = out(reg) _,
                    lines = in(reg) lines,
                    line_bytes = in(reg) LINE,
                    x_bytes = const ROWS * LINE,
                    panel_bytes = in(reg) PANEL_BYTES,
                    step_bytes = const WORDS_OF_TILE * PANEL_BYTES,
                    tile_bytes = const ROWS * PANEL_BYTES,
                    sums = inout(reg) sums => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                ),
                _ => unreachable!("rows are filled up to whole tiles, and come in two at most"),
            }
        }
    }};
}

/// What tiles hold.
pub trait Tiles: Element {
    /// One or two tiles of rows, `x`, times a panel. Asks for the lines of `ahead` meanwhile.
    fn multiply(x: &[u32], words_of_row: usize, panel: &[Self], ahead: &[Self], sums: &mut Sums);

    /// The sums of a row and a panel.
    fn read(sums: &[u32; PANEL], row_scale: f32, ends: &[Self]) -> [f32; PANEL];
}

/// Multiplies rows in tiles of [`ROWS`] by panels.
pub fn product<E: Tiles>(product: PackedProduct<'_, '_, E>) {
    // SAFETY: `is_available` was asked before these instructions were chosen; every processor that
    // has tiles has AVX-512.
    unsafe { with_vectors(product) }
}

/// With instructions for what becomes of the sums.
#[target_feature(enable = "avx512f,avx512vl")]
fn with_vectors<E: Tiles>(product: PackedProduct<'_, '_, E>) {
    let PackedProduct { x, panels, bias, adds, out } = product;
    let columns = out.first().map_or(0, |row| row.len());
    let (words_of_row, scales) = (x.words_of_row(), x.scales());
    // SAFETY: `is_available` was asked before these instructions were chosen, and the configuration
    // is 64 bytes of a valid palette. Nothing else in this process uses tiles, so that they stay
    // configured until they are released below.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const WHOLE_TILES, options(nostack, readonly)) };
    // Sums are written back while those of the next tiles are made: the processor would wait for
    // tiles that it has just stored.
    let mut sums = [const { Sums([[0; PANEL]; TILES * ROWS]) }; 2];
    let (mut newest, mut stored) = (0, None);
    let rows_per_block = ROWS_PER_BLOCK.next_multiple_of(TILES * ROWS);
    let blocks = x.words().chunks(rows_per_block * words_of_row);
    for (x, first_row) in blocks.zip((0..out.len()).step_by(rows_per_block)) {
        let end = out.len().min(first_row + rows_per_block);
        let groups = (end - first_row).div_ceil(TILES * ROWS);
        for (first_column, panel) in (0..columns).step_by(PANEL).zip(0..) {
            let (panel, next) = (panels[panel], panels.get(panel + 1).unwrap_or(&panels[panel]));
            // The groups of rows share out the next panel, which is on its way to the cache meanwhile.
            let mut shares = next.chunks(next.len().div_ceil(groups));
            let rows = x.chunks(TILES * ROWS * words_of_row);
            for (x, first_row) in rows.zip((first_row..).step_by(TILES * ROWS)) {
                let ahead = shares.next().unwrap_or_default();
                E::multiply(x, words_of_row, panel, ahead, &mut sums[newest]);
                let rows = first_row..end.min(first_row + TILES * ROWS);
                let ends = &panel[words_of_row * PANEL..];
                if let Some(stored) = stored.replace(Stored { rows, first_column, ends }) {
                    stored.write_back(&sums[1 - newest], scales, bias, adds, out);
                }
                newest = 1 - newest;
            }
        }
    }
    if let Some(stored) = stored {
        stored.write_back(&sums[1 - newest], scales, bias, adds, out);
    }
    // SAFETY: the tiles were configured above, and nobody reads them any more.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// Where sums belong that are stored and not written back yet.
struct Stored<'a, E> {
    rows: Range<usize>,
    first_column: usize,
    /// What stands behind the numbers of the panel.
    ends: &'a [E],
}

impl<E: Tiles> Stored<'_, E> {
    #[inline(always)]
    fn write_back(
        self,
        sums: &Sums,
        scales: &[f32],
        bias: Option<&[f32]>,
        adds: bool,
        out: &mut [&mut [f32]],
    ) {
        for (sums, row) in sums.0.iter().zip(self.rows) {
            let scale = scales.get(row).copied().unwrap_or_default();
            let mut sums = [E::read(sums, scale, self.ends)];
            finish(&mut sums, self.first_column, bias, adds, &mut out[row..row + 1]);
        }
    }
}

impl Tiles for Pair {
    fn multiply(x: &[u32], words_of_row: usize, panel: &[Pair], ahead: &[Pair], sums: &mut Sums) {
        multiply!("tdpbf16ps", x, words_of_row, panel, ahead, sums);
    }

    #[inline(always)]
    fn read(sums: &[u32; PANEL], _: f32, _: &[Pair]) -> [f32; PANEL] {
        bytemuck::cast(*sums)
    }
}

impl Tiles for Quad {
    fn multiply(x: &[u32], words_of_row: usize, panel: &[Quad], ahead: &[Quad], sums: &mut Sums) {
        multiply!("tdpbssd", x, words_of_row, panel, ahead, sums);
    }

    #[inline(always)]
    fn read(sums: &[u32; PANEL], row_scale: f32, ends: &[Quad]) -> [f32; PANEL] {
        scaled(bytemuck::cast_ref(sums), row_scale, ends)
    }
}
