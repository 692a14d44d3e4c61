// What threads do together: barriers, shuffles, votes, tensor cores, copies, atomics.
#include "runtime.h"

namespace emulator {

// Warps.

void complete_collective(Worker* worker, unsigned warp, Pending* pending, Fiber* self) {
  if (pending->compute) {
    pending->arguments.mask = pending->mask;
    pending->arguments.present = pending->arrived;
    pending->arguments.operation = pending->operation;
    pending->compute(pending->arguments);
  }
  if (is_checked && (pending->flags & kOrdersMemory)) join_clocks(worker, warp, pending->arrived);
  for (unsigned lanes = pending->arrived; lanes; lanes &= lanes - 1) {
    Fiber* fiber = &worker->fibers[warp * 32 + __builtin_ctz(lanes)];
    if (fiber != self) make_ready(worker, fiber);
  }
  Warp& of = worker->warps[warp];
  of.pending.erase(std::find(of.pending.begin(), of.pending.end(), pending));
  of.spare.push_back(pending);
}

void warp_collective(const char* operation, unsigned mask, void* argument, Compute compute,
                     unsigned flags, Site site) {
  Fiber* self = fiber;
  Warp& warp = worker->warps[self->warp];
  const unsigned bit = 1u << self->lane;
  if (!(mask & bit))
    fail("%s at %s:%d with mask 0x%08x, which does not contain the calling lane %u", operation,
         file_name(site.file), site.line, mask, self->lane);
  if ((mask & ~warp.existing) && mask != kAllLanes)
    fail("%s at %s:%d: mask 0x%08x names lanes that do not exist (the warp has 0x%08x)",
         operation, file_name(site.file), site.line, mask, warp.existing);
  if ((flags & kNeedsAllLanes) && warp.live != kAllLanes)
    fail("%s at %s:%d needs all 32 lanes, and only 0x%08x are alive", operation,
         file_name(site.file), site.line, warp.live);
  auto has_mask = [&](const Pending* pending) { return pending->mask == mask; };
  auto found = std::find_if(warp.pending.begin(), warp.pending.end(), has_mask);
  Pending* pending;
  if (found != warp.pending.end()) {
    pending = *found;
    if (strcmp(pending->operation, operation) || pending->site.line != site.line ||
        strcmp(pending->site.file, site.file))
      fail("warp divergence: lane %u is at %s (%s:%d) while lanes 0x%08x of the same mask 0x%08x "
           "wait at %s (%s:%d)",
           self->lane, operation, file_name(site.file), site.line, pending->arrived, mask,
           pending->operation, file_name(pending->site.file), pending->site.line);
  } else {
    if (warp.spare.empty()) {
      pending = new Pending;
    } else {
      pending = warp.spare.back();
      warp.spare.pop_back();
    }
    pending->mask = mask;
    pending->arrived = 0;
    pending->flags = flags;
    pending->operation = operation;
    pending->compute = compute;
    pending->site = site;
    warp.pending.push_back(pending);
  }
  pending->arrived |= bit;
  pending->arguments.of_lane[self->lane] = argument;
  const unsigned needed = mask & warp.live;
  if ((pending->arrived & needed) == needed) {
    complete_collective(worker, self->warp, pending, self);
    if (worker->launch->order == Order::kRandom && random_bits(worker) % 4 == 0) {
      make_ready(worker, self);
      run_another(self);
    }
    return;
  }
  self->state = State::kAtWarpCollective;
  self->operation = operation;
  self->site = site;
  self->mask = mask;
  run_another(self);
}

// Calls `each(lane, argument)` for the lanes that take part.
template <class Argument, class Each>
static void for_each_lane(const Arguments& arguments, Each each) {
  for (unsigned lanes = arguments.present; lanes; lanes &= lanes - 1) {
    int lane = __builtin_ctz(lanes);
    each(lane, *static_cast<Argument*>(arguments.of_lane[lane]));
  }
}

struct ShuffleArgument {
  Shuffle kind;
  uint64_t in, out;
  int selector, width;
};

static int source_lane(const ShuffleArgument& argument, int lane) {
  const int width = argument.width, selector = argument.selector;
  const int first = lane & ~(width - 1), at = lane & (width - 1);
  switch (argument.kind) {
    case Shuffle::kIndex: return first | (selector & (width - 1));
    case Shuffle::kUp: return at >= selector ? lane - selector : lane;
    default: return (lane ^ selector) < first + width ? lane ^ selector : lane;
  }
}

static void compute_shuffle(const Arguments& arguments) {
  for_each_lane<ShuffleArgument>(arguments, [&](int lane, ShuffleArgument& argument) {
    const int width = argument.width;
    if (width < 1 || width > 32 || (width & (width - 1)))
      fail("%s: width %d is not a power of two up to 32", arguments.operation, width);
    const int source = source_lane(argument, lane);
    if (source > 31 || !(arguments.present >> source & 1))
      fail("%s: lane %d reads lane %d, which does not take part (mask 0x%08x)",
           arguments.operation, lane, source, arguments.mask);
    argument.out = static_cast<ShuffleArgument*>(arguments.of_lane[source])->in;
  });
}

uint64_t shuffle(const char* operation, Shuffle kind, unsigned mask, uint64_t value, int selector,
                 int width, Site site) {
  ShuffleArgument argument{kind, value, 0, selector, width};
  warp_collective(operation, mask, &argument, compute_shuffle, 0, site);
  return argument.out;
}

struct BallotArgument {
  bool in;
  unsigned out;
};

static void compute_ballot(const Arguments& arguments) {
  unsigned bits = 0;
  for_each_lane<BallotArgument>(arguments, [&](int lane, const BallotArgument& argument) {
    bits |= unsigned(argument.in) << lane;
  });
  for_each_lane<BallotArgument>(arguments,
                                [&](int, BallotArgument& argument) { argument.out = bits; });
}

unsigned ballot(const char* operation, unsigned mask, bool predicate, Site site) {
  BallotArgument argument{predicate, 0};
  warp_collective(operation, mask, &argument, compute_ballot, 0, site);
  return argument.out;
}

// Blocks.

void complete_barrier(Worker* worker) {
  worker->vote_result = int(worker->num_true);
  worker->num_waiting = 0;
  if (worker->launch->order == Order::kRandom) shuffle_priorities(worker);
  for (unsigned i = 0; i < worker->num_threads; i++) {
    Fiber* fiber = &worker->fibers[i];
    fiber->epoch++;
    if (fiber->state == State::kAtBlockBarrier) make_ready(worker, fiber);
  }
}

int block_barrier(Vote vote, int predicate, Site site) {
  Fiber* self = fiber;
  if (worker->num_live != worker->num_threads)
    fail("__syncthreads at %s:%d after %u threads of the block have exited", file_name(site.file),
         site.line, worker->num_threads - worker->num_live);
  if (worker->num_waiting == 0) {
    worker->vote = vote;
    worker->barrier_site = site;
    worker->num_true = 0;
  } else if (vote != worker->vote || site.line != worker->barrier_site.line ||
             strcmp(site.file, worker->barrier_site.file)) {
    fail("divergent __syncthreads: this thread is at %s:%d while %u others wait at %s:%d",
         file_name(site.file), site.line, worker->num_waiting,
         file_name(worker->barrier_site.file), worker->barrier_site.line);
  }
  worker->num_waiting++;
  worker->num_true += predicate != 0;
  self->operation = "__syncthreads";
  self->site = site;
  self->mask = 0;
  if (worker->num_waiting == worker->num_live) {
    complete_barrier(worker);
    make_ready(worker, self);  // or the last to arrive would always be the first to go on
  } else {
    self->state = State::kAtBlockBarrier;
  }
  run_another(self);
  return worker->vote_result;
}

// Tensor cores. The layouts of fragments are those of the PTX manual: "ldmatrix" and
// "mma.m16n8k16 with .bf16", sections on matrix fragments.

static bool is_shared(const void* at) {
  return size_t(static_cast<const uint8_t*>(at) - worker->arena) < kArenaBytes;
}

struct LoadArgument {
  unsigned* registers;
  const uint16_t* row;  // lane i gives row i % 8 of matrix i / 8
};

static const uint16_t* row_of(const Arguments& arguments, int lane) {
  return static_cast<LoadArgument*>(arguments.of_lane[lane])->row;
}

static void compute_load(const Arguments& arguments) {
  for_each_lane<LoadArgument>(arguments, [&](int lane, LoadArgument& argument) {
    for (int matrix = 0; matrix < 4; matrix++) {
      const uint16_t* row = row_of(arguments, matrix * 8 + lane / 4);
      const int column = 2 * (lane % 4);
      argument.registers[matrix] = row[column] | unsigned(row[column + 1]) << 16;
    }
  });
}

static void compute_load_transposed(const Arguments& arguments) {
  for_each_lane<LoadArgument>(arguments, [&](int lane, LoadArgument& argument) {
    for (int matrix = 0; matrix < 4; matrix++) {
      const int column = lane / 4, row = matrix * 8 + 2 * (lane % 4);
      argument.registers[matrix] = row_of(arguments, row)[column] |
                                   unsigned(row_of(arguments, row + 1)[column]) << 16;
    }
  });
}

void ldmatrix(unsigned* registers, bool is_transposed, const void* row, Site site) {
  if (uintptr_t(row) & 15)
    fail("ldmatrix at %s:%d: the row's address is not 16-byte aligned", file_name(site.file),
         site.line);
  if (!is_shared(row))
    fail("ldmatrix at %s:%d: the row is not in shared memory", file_name(site.file), site.line);
  note_access(row, 16, false, false, site);
  LoadArgument argument{registers, static_cast<const uint16_t*>(row)};
  warp_collective("ldmatrix", kAllLanes, &argument,
                  is_transposed ? compute_load_transposed : compute_load, kNeedsAllLanes, site);
}

struct MmaArgument {
  float* d;
  const unsigned *a, *b;
};

static float low(unsigned pair) { return __uint_as_float(pair << 16); }
static float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

typedef float Row8 __attribute__((vector_size(32)));

__attribute__((target_clones("avx2,fma", "default"))) static void multiply(
    const float (&a)[16][16], const Row8 (&b)[16], Row8 (&d)[16]) {
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++) d[row] += a[row][k] * b[k];
}

static void compute_mma(const Arguments& arguments) {
  float a[16][16];
  Row8 b[16], d[16];
  for_each_lane<MmaArgument>(arguments, [&](int lane, const MmaArgument& argument) {
    const int group = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
      const int row = group + i % 2 * 8, k = column + i / 2 * 8;
      a[row][k] = low(argument.a[i]);
      a[row][k + 1] = high(argument.a[i]);
    }
    for (int i = 0; i < 2; i++) {
      b[column + i * 8][group] = low(argument.b[i]);
      b[column + i * 8 + 1][group] = high(argument.b[i]);
    }
    for (int i = 0; i < 4; i++) d[group + i / 2 * 8][column + i % 2] = argument.d[i];
  });
  multiply(a, b, d);
  for_each_lane<MmaArgument>(arguments, [&](int lane, MmaArgument& argument) {
    for (int i = 0; i < 4; i++) argument.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

void mma_bf16(float* d, const unsigned* a, const unsigned* b, Site site) {
  MmaArgument argument{d, a, b};
  warp_collective("mma.m16n8k16", kAllLanes, &argument, compute_mma, kNeedsAllLanes, site);
}

// Products of warpgroups. Each of the four warps computes its own 16 rows, when they are waited for;
// until then the result is poisoned. The other matrix is read where its descriptor says, both when
// the product is asked for and when it is computed. The layouts are those of the PTX manual:
// "wgmma.mma_async", sections on register fragments, matrix descriptors and swizzling.

unsigned shared_address(const void* at) {
  if (!is_shared(at)) fail("the address is not in shared memory");
  return unsigned(static_cast<const uint8_t*>(at) - worker->arena);
}

// Where eight numbers of b begin: in a row of columns or, if it is not transposed, in a column.
static const uint8_t* pack_of(const AsyncProduct& product, unsigned row, unsigned column) {
  const uint64_t b = product.b;
  auto bytes_at = [&](int bit) { return unsigned(b >> bit & 0x3fff) << 4; };
  const unsigned in_row = product.is_transposed ? column : row;
  const unsigned group = product.is_transposed ? row : column;
  const unsigned at = bytes_at(0) + in_row / 64 * bytes_at(16) + group / 8 * bytes_at(32) +
                      group % 8 * 128 + in_row % 64 * 2;
  return worker->arena + (at ^ (at >> 7 & 7) << 4);
}

static void note_reads(const AsyncProduct& product) {
  const unsigned packs_in_column = 2, num_columns = product.num_columns * 8;
  for (unsigned i = fiber->lane; i < packs_in_column * num_columns; i += 32) {
    const uint8_t* pack = product.is_transposed
                              ? pack_of(product, i % 16, i / 16 * 8)
                              : pack_of(product, i % 2 * 8, i / 2);
    note_access(pack, 16, false, false, product.site);
  }
}

void multiply_async(float* d, unsigned num_columns, const unsigned* a, uint64_t b, bool adds,
                    bool is_transposed, Site site) {
  if (b >> 62 != 1)
    fail("wgmma at %s:%d: the matrix is not in 128-byte swizzle", file_name(site.file), site.line);
  AsyncProduct product{d, {}, num_columns, {a[0], a[1], a[2], a[3]}, b, adds, is_transposed, site};
  note_reads(product);
  auto changes = [&](const AsyncProduct& other) { return other.d == d; };
  if (std::none_of(fiber->products.begin(), fiber->products.end(), changes)) {
    product.before.assign(d, d + num_columns * 4);
    memset(d, kPoison, num_columns * 4 * sizeof(float));
  }
  fiber->products.push_back(std::move(product));
}

void commit_products() {
  unsigned committed = 0;
  for (unsigned count : fiber->product_groups) committed += count;
  fiber->product_groups.push_back(unsigned(fiber->products.size()) - committed);
}

static void compute_product(const Arguments& arguments) {
  const AsyncProduct& first = *static_cast<AsyncProduct*>(arguments.of_lane[0]);
  for_each_lane<AsyncProduct>(arguments, [&](int lane, AsyncProduct& product) {
    if (product.b != first.b || product.site.line != first.site.line)
      fail("wgmma: lane %d multiplies by another matrix than lane 0", lane);
    if (!product.before.empty())
      std::copy(product.before.begin(), product.before.end(), product.d);
  });
  for (unsigned n = 0; n < first.num_columns; n++) {
    const Arguments& all = arguments;
    float a[16][16];
    Row8 b[16], d[16];
    for (unsigned k = 0; k < 16; k++)
      for (unsigned column = 0; column < 8; column++) {
        const unsigned in_pack = (first.is_transposed ? column : k % 8) * 2;
        const uint8_t* pack = first.is_transposed ? pack_of(first, k, n * 8)
                                                  : pack_of(first, k / 8 * 8, n * 8 + column);
        b[k][column] = low(*reinterpret_cast<const uint16_t*>(pack + in_pack));
      }
    for_each_lane<AsyncProduct>(all, [&](int lane, const AsyncProduct& product) {
      const int group = lane / 4, column = lane % 4 * 2;
      for (int i = 0; i < 4; i++) {
        const int row = group + i % 2 * 8, k = column + i / 2 * 8;
        a[row][k] = low(product.a[i]);
        a[row][k + 1] = high(product.a[i]);
        const float before = product.adds ? product.d[n * 4 + i] : 0.0f;
        d[group + i / 2 * 8][column + i % 2] = before;
      }
    });
    multiply(a, b, d);
    for_each_lane<AsyncProduct>(all, [&](int lane, AsyncProduct& product) {
      for (int i = 0; i < 4; i++)
        product.d[n * 4 + i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    });
  }
}

void wait_for_products(int groups_in_flight, Site site) {
  size_t count = 0;
  while (int(fiber->product_groups.size()) > groups_in_flight) {
    count += fiber->product_groups.front();
    fiber->product_groups.erase(fiber->product_groups.begin());
  }
  for (size_t i = 0; i < count; i++) {
    note_reads(fiber->products[i]);
    warp_collective("wgmma", kAllLanes, &fiber->products[i], compute_product, kNeedsAllLanes, site);
  }
  fiber->products.erase(fiber->products.begin(), fiber->products.begin() + count);
}

// Asynchronous copies happen when they are waited for, and the destination is poisoned until then:
// so both a missing wait and a buffer that is refilled too early are seen.

void cp_async(void* to, const void* from, int bytes, int source_bytes, Site site) {
  if ((uintptr_t(to) | (source_bytes ? uintptr_t(from) : 0)) & (bytes - 1))
    fail("cp.async at %s:%d: the addresses are not %d-byte aligned", file_name(site.file),
         site.line, bytes);
  if (!is_shared(to))
    fail("cp.async at %s:%d: the destination is not shared memory", file_name(site.file),
         site.line);
  if (source_bytes) note_access(from, source_bytes, false, false, site);
  note_access(to, bytes, true, false, site);
  set_shared_bytes(to, bytes, SharedByte::kInFlight);
  memset(to, kPoison, bytes);
  fiber->copies.push_back({to, from, bytes, source_bytes, site});
}

void cp_async_commit() {
  unsigned committed = 0;
  for (unsigned count : fiber->copy_groups) committed += count;
  fiber->copy_groups.push_back(unsigned(fiber->copies.size()) - committed);
}

void cp_async_wait(int groups_in_flight) {
  size_t count = 0;
  while (int(fiber->copy_groups.size()) > groups_in_flight) {
    count += fiber->copy_groups.front();
    fiber->copy_groups.erase(fiber->copy_groups.begin());
  }
  for (size_t i = 0; i < count; i++) {
    const AsyncCopy& copy = fiber->copies[i];
    set_shared_bytes(copy.to, copy.bytes, SharedByte::kUninitialised);
    note_access(copy.to, copy.bytes, true, false, copy.site);
    memcpy(copy.to, copy.from, copy.source_bytes);
    memset(static_cast<uint8_t*>(copy.to) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
  fiber->copies.erase(fiber->copies.begin(), fiber->copies.begin() + count);
}

// Atomics.

template <class T, class Combine>
static T combine_atomically(T* to, Combine combine, Site site) {
  note_access(to, sizeof(T), true, true, site);
  T before;
  __atomic_load(to, &before, __ATOMIC_RELAXED);
  for (;;) {
    T after = combine(before);
    if (__atomic_compare_exchange(to, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      break;
  }
  if (worker->launch->order == Order::kRandom && random_bits(worker) % 16 == 0) {
    make_ready(worker, fiber);
    run_another(fiber);
  }
  return before;
}

template <class T> T atomic_add(T* to, T value, Site site) {
  return combine_atomically(to, [&](T before) { return T(before + value); }, site);
}
template <class T> T atomic_max(T* to, T value, Site site) {
  return combine_atomically(to, [&](T before) { return std::max(before, value); }, site);
}
template unsigned atomic_add(unsigned*, unsigned, Site);
template float atomic_add(float*, float, Site);
template unsigned atomic_max(unsigned*, unsigned, Site);

}  // namespace emulator
