// Memory of blocks and of the device, and what is checked of every access.
//
// Kernel files are compiled with -fsanitize=thread, whose hooks are defined here: every load and
// store of a kernel comes by. Found are accesses outside arrays, reads of memory that nobody wrote,
// accesses to what an asynchronous copy is about to write, misaligned accesses, and races.
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <shared_mutex>

#include "runtime.h"

namespace emulator {

static std::shared_mutex buffers_mutex;
static std::map<uintptr_t, Buffer*> buffers;  // by end

static void* map_zeros(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
              -1, 0);
}

// Shared memory.

void forget_block(Worker* worker) {
  // What an earlier block had there is outside of every array of the next.
  if (is_checked && worker->arena_used)
    memset(worker->shared_bytes, int(SharedByte::kOutside), worker->arena_used + kRedZone);
  worker->arena_used = 0;
  worker->regions.clear();
}

static void* add_region(const void* key, size_t offset, size_t bytes, size_t alignment,
                        const char* name) {
  const size_t used = worker->arena_used;
  const size_t start = (used + kRedZone + alignment - 1) / alignment * alignment;
  if (start + bytes + kRedZone > kArenaBytes) fail("the block's shared memory is too large");
  uint8_t* at = worker->arena + start;
  memset(worker->arena + used, kCanary, start - used);
  memset(at, kPoison, bytes);
  memset(at + bytes, kCanary, kRedZone);
  if (is_checked) {
    memset(worker->shared_bytes + used, int(SharedByte::kOutside), start - used);
    memset(worker->shared_bytes + start, int(SharedByte::kUninitialised), bytes);
    memset(worker->shared_bytes + start + bytes, int(SharedByte::kOutside), kRedZone);
    memset(static_cast<void*>(worker->cells + start / 2), 0, (bytes + 1) / 2 * sizeof(Cell));
  }
  worker->arena_used = start + bytes;
  worker->regions.push_back({key, offset, bytes, at, name});
  return at;
}

void* static_shared(const void* key, size_t bytes, size_t alignment, const char* name) {
  for (const Region& region : worker->regions)
    if (region.key == key) return region.start;
  return add_region(key, 0, bytes, std::max<size_t>(alignment, 16), name);
}

void* dynamic_shared(size_t offset, size_t bytes, size_t alignment, const char* name) {
  for (const Region& region : worker->regions) {
    if (region.key) continue;
    if (region.offset == offset && region.bytes == bytes && !strcmp(region.name, name))
      return region.start;
    if (offset < region.offset + region.bytes && region.offset < offset + bytes)
      fail("'%s' and '%s' overlap in dynamic shared memory", name, region.name);
  }
  if (offset + bytes > worker->launch->shared_bytes)
    fail("'%s' ends at byte %zu of dynamic shared memory, and the launch gave %zu", name,
         offset + bytes, worker->launch->shared_bytes);
  return add_region(nullptr, offset, bytes, alignment, name);
}

// Overruns are seen at a block's end even where accesses are not checked.
void check_canaries(Worker* worker) {
  for (size_t i = 0; i < worker->regions.size(); i++) {
    const Region& region = worker->regions[i];
    const bool is_last = i + 1 == worker->regions.size();
    const uint8_t* end = is_last ? region.start + region.bytes + kRedZone
                                 : worker->regions[i + 1].start;
    for (const uint8_t* at = region.start + region.bytes; at < end; at++) {
      if (*at == kCanary) continue;
      char text[200];
      snprintf(text, sizeof text,
               ": byte %zu past the end of shared '%s' (%zu bytes) was overwritten",
               size_t(at - region.start - region.bytes), region.name, region.bytes);
      record_failure(where() + text);
      return;
    }
  }
}

void set_shared_bytes(const void* at, size_t bytes, SharedByte state) {
  if (is_checked)
    memset(worker->shared_bytes + (static_cast<const uint8_t*>(at) - worker->arena), int(state),
           bytes);
}

static const Region* region_at(uintptr_t address) {
  const Region* best = nullptr;
  for (const Region& region : worker->regions)
    if (address >= uintptr_t(region.start) && (!best || region.start > best->start))
      best = &region;
  return best;
}

// Places in the source, for reports.

static uintptr_t load_address = 0;
static std::string own_file;
struct Range {
  uintptr_t start, end;
};
static std::vector<Range> segments;              // constants and static data
static thread_local std::vector<Range> storage;  // thread-local data

static int note_segments(dl_phdr_info* info, size_t, void*) {
  bool is_own = false;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr)& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t start = info->dlpi_addr + header.p_vaddr, end = start + header.p_memsz;
    segments.push_back({start, end});
    const uintptr_t here = uintptr_t(&note_segments);
    is_own = is_own || (here >= start && here < end);
  }
  if (is_own) {
    load_address = info->dlpi_addr;
    own_file = info->dlpi_name;
  }
  return 0;
}
void remember_segments() { dl_iterate_phdr(note_segments, nullptr); }

static int note_storage(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr)& header = info->dlpi_phdr[i];
    if (header.p_type != PT_TLS || !info->dlpi_tls_data) continue;
    const uintptr_t start = uintptr_t(info->dlpi_tls_data);
    storage.push_back({start, start + header.p_memsz});
  }
  return 0;
}
void remember_thread_storage() {
  storage.clear();
  dl_iterate_phdr(note_storage, nullptr);
}

std::string source_line(uintptr_t return_address) {
  char command[512], line[512] = "";
  snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null",
           own_file.empty() ? "/proc/self/exe" : own_file.c_str(),
           size_t(return_address - 1 - load_address));
  if (FILE* pipe = popen(command, "r")) {
    if (!fgets(line, sizeof line, pipe)) line[0] = 0;
    pclose(pipe);
  }
  line[strcspn(line, "\n ")] = 0;
  return line[0] ? file_name(line) : "unknown line";
}

static std::mutex sites_mutex;
static std::vector<Site> sites;

// Who accesses: the address of the code that called a hook, or the site of a call of the runtime.
struct Accessor {
  uintptr_t return_address;
  const Site* site;

  // As 32 bits: an offset in the code, or the number of a site with the highest bit set.
  unsigned place() const {
    if (!site) return unsigned(return_address - load_address);
    std::lock_guard<std::mutex> guard(sites_mutex);
    for (size_t i = 0; i < sites.size(); i++)
      if (sites[i].file == site->file && sites[i].line == site->line)
        return 0x80000000u | unsigned(i);
    sites.push_back(*site);
    return 0x80000000u | unsigned(sites.size() - 1);
  }
  std::string text() const { return describe(place()); }
  static std::string describe(unsigned place) {
    if (!(place & 0x80000000u)) return source_line(place + load_address);
    std::lock_guard<std::mutex> guard(sites_mutex);
    const Site& site = sites[place & 0x7fffffff];
    return std::string(file_name(site.file)) + ":" + std::to_string(site.line);
  }
};

// Races. Two accesses are in order if a barrier of the block or a __syncwarp lies between them;
// shuffles, votes and tensor cores do not order memory. Blocks of a launch are in no order.

constexpr uint64_t kIsAtomic = 2;
constexpr uint64_t kClockMask = (1 << 25) - 1;

// valid 1, atomic 1, which of the two bytes 2, thread 10, epoch 25, clock 25
static uint64_t record(const Fiber* fiber, unsigned bytes, bool is_atomic) {
  return 1 | uint64_t(is_atomic) << 1 | uint64_t(bytes) << 2 | uint64_t(fiber->linear) << 4 |
         (fiber->epoch & kClockMask) << 14 | (fiber->clock & kClockMask) << 39;
}
static unsigned bytes_of(uint64_t record) { return record >> 2 & 3; }
static unsigned thread_of(uint64_t record) { return record >> 4 & 1023; }
static unsigned epoch_of(uint64_t record) { return record >> 14 & kClockMask; }
static unsigned clock_of(uint64_t record) { return unsigned(record >> 39); }

static bool is_before_now(uint64_t earlier, unsigned block, const Fiber* now) {
  if (block != worker->block_number) return false;
  const unsigned thread = thread_of(earlier);
  return thread == now->linear || epoch_of(earlier) < now->epoch ||
         (thread / 32 == now->warp && clock_of(earlier) <= now->clocks[thread % 32]);
}

void join_clocks(Worker* worker, unsigned warp, unsigned lanes) {
  unsigned joined[32] = {};
  auto fiber_of = [&](unsigned lane) -> Fiber& { return worker->fibers[warp * 32 + lane]; };
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    const unsigned lane = __builtin_ctz(rest);
    for (int i = 0; i < 32; i++) joined[i] = std::max(joined[i], fiber_of(lane).clocks[i]);
    joined[lane] = std::max(joined[lane], fiber_of(lane).clock);
  }
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    Fiber& fiber = fiber_of(__builtin_ctz(rest));
    memcpy(fiber.clocks, joined, sizeof joined);
    fiber.clock++;
  }
}

// An access of one kind of memory, by name and offset.
struct Access {
  bool is_write, is_atomic;
  Accessor by;
  const char* space;
  const char* name;
  const char* verb() const { return is_write ? "write" : "read"; }
};

static void fail_race(const Access& now, size_t offset, const char* verb, uint64_t earlier,
                      unsigned block, unsigned place) {
  const dim3& grid = worker->launch->grid;
  const unsigned thread = thread_of(earlier);
  fail("race on %s '%s'+%zu: %s at %s, not ordered after the earlier %s by block (%u,%u,%u) thread "
       "%u [warp %u lane %u] at %s",
       now.space, now.name, offset, now.verb(), now.by.text().c_str(), verb, block % grid.x,
       block / grid.x % grid.y, block / grid.x / grid.y, thread, thread / 32, thread % 32,
       Accessor::describe(place).c_str());
}

static void check_cell(Cell& cell, unsigned bytes, const Access& access, size_t offset) {
  const Fiber* self = fiber;
  const uint64_t now = record(self, bytes, access.is_atomic);
  const unsigned block = worker->block_number;
  auto conflicts = [&](uint64_t earlier, unsigned of_block) {
    return earlier && (bytes_of(earlier) & bytes) && !is_before_now(earlier, of_block, self);
  };
  const bool are_atomic = access.is_atomic && (cell.write & kIsAtomic);
  if (!are_atomic && conflicts(cell.write, cell.write_block))
    fail_race(access, offset, "write", cell.write, cell.write_block, cell.write_place);
  if (access.is_write) {
    for (int i = 0; i < 2; i++)
      if (conflicts(cell.reads[i], cell.read_blocks[i]))
        fail_race(access, offset, "read", cell.reads[i], cell.read_blocks[i],
                  cell.read_places[i]);
    const bool is_same = cell.write && cell.write_block == block &&
                         thread_of(cell.write) == self->linear && !(cell.write & kIsAtomic);
    cell.write = is_same ? now | (cell.write & 12) : now;
    cell.write_block = block;
    cell.write_place = access.by.place();
    return;
  }
  const bool is_same =
      cell.reads[0] && thread_of(cell.reads[0]) == self->linear && cell.read_blocks[0] == block;
  if (!is_same) {
    cell.reads[1] = cell.reads[0];
    cell.read_blocks[1] = cell.read_blocks[0];
    cell.read_places[1] = cell.read_places[0];
  }
  cell.reads[0] = now;
  cell.read_blocks[0] = block;
  cell.read_places[0] = access.by.place();
}

static void check_cells(Cell* cells, size_t first, size_t bytes, const Access& access,
                        size_t offset) {
  for (size_t at = first; at < first + bytes;) {
    const size_t cell = at / 2;
    const unsigned which = at % 2 ? 2u : at + 1 < first + bytes ? 3u : 1u;
    check_cell(cells[cell], which, access, offset + (at - first));
    at = (cell + 1) * 2;
  }
}

// One access.

static void check_shared(uintptr_t address, size_t bytes, Access access) {
  const size_t first = address - uintptr_t(worker->arena);
  const Region* region = region_at(address);
  const char* name = region ? region->name : "?";
  for (size_t i = 0; i < bytes; i++) {
    const SharedByte state = worker->shared_bytes[first + i];
    const bool is_fine = state == SharedByte::kInitialised ||
                         (state == SharedByte::kUninitialised && access.is_write &&
                          !access.is_atomic);
    if (is_fine) continue;
    const size_t offset = region ? address + i - uintptr_t(region->start) : 0;
    const std::string line = access.by.text();
    if (state == SharedByte::kOutside)
      fail("out-of-bounds shared %s of %zu bytes: offset %zu in '%s' of %zu bytes (%s)",
           access.verb(), bytes, offset, name, region ? region->bytes : 0, line.c_str());
    if (state == SharedByte::kUninitialised)
      fail("read of uninitialised shared memory: '%s'+%zu (%s)", name, offset, line.c_str());
    fail("%s of '%s'+%zu while a cp.async to it is still in flight (%s)", access.verb(), name,
         offset, line.c_str());
  }
  access.space = "shared";
  access.name = name;
  check_cells(worker->cells, first, bytes, access, address - uintptr_t(region->start));
  if (access.is_write)
    memset(worker->shared_bytes + first, int(SharedByte::kInitialised), bytes);
}

static Buffer* buffer_at(uintptr_t address) {
  std::shared_lock<std::shared_mutex> guard(buffers_mutex);
  auto next = buffers.upper_bound(address);
  return next != buffers.end() && address >= next->second->start ? next->second : nullptr;
}

std::string nearest_buffer(uintptr_t address) {
  std::shared_lock<std::shared_mutex> guard(buffers_mutex);
  auto next = buffers.upper_bound(address);
  char text[240] = "no buffer is near";
  if (next != buffers.begin()) {
    const Buffer& before = *std::prev(next)->second;
    if (address - before.end < (1u << 20)) {
      snprintf(text, sizeof text, "%zu bytes past the end of '%s' (%zu bytes)",
               size_t(address - before.end), before.name.c_str(),
               size_t(before.end - before.start));
      return text;
    }
  }
  if (next != buffers.end() && next->second->start - address < (1u << 20))
    snprintf(text, sizeof text, "%zu bytes before '%s'", size_t(next->second->start - address),
             next->second->name.c_str());
  return text;
}

static bool is_within(const std::vector<Range>& ranges, uintptr_t address, size_t bytes) {
  for (const Range& range : ranges)
    if (address >= range.start && address + bytes <= range.end) return true;
  return false;
}

static void check_global(uintptr_t address, size_t bytes, Access access) {
  Buffer* buffer = worker->last_buffer;
  if (!buffer || address < buffer->start || address + bytes > buffer->end) {
    buffer = buffer_at(address);
    if (!buffer) {
      const Launch* launch = worker->launch;
      if (address - uintptr_t(launch->params) < launch->kernel->params_bytes) return;
      if (is_within(segments, address, bytes) || is_within(storage, address, bytes)) return;
      fail("%zu-byte %s outside every device buffer: %s (%s)", bytes, access.verb(),
           nearest_buffer(address).c_str(), access.by.text().c_str());
    }
    if (address + bytes > buffer->end)
      fail("out-of-bounds global %s of %zu bytes: offset %zu in '%s' of %zu bytes (%s)",
           access.verb(), bytes, size_t(address - buffer->start), buffer->name.c_str(),
           size_t(buffer->end - buffer->start), access.by.text().c_str());
    worker->last_buffer = buffer;
  }
  (access.is_write ? buffer->bytes_written : buffer->bytes_read) += bytes;
  uint8_t* is_written = buffer->is_written + (address - buffer->start);
  if (access.is_write && !access.is_atomic) {
    memset(is_written, 1, bytes);
  } else if (const void* unwritten = memchr(is_written, 0, bytes)) {
    fail("read of uninitialised global memory: '%s'+%zu of %zu bytes (%s)", buffer->name.c_str(),
         size_t(static_cast<const uint8_t*>(unwritten) - buffer->is_written),
         size_t(buffer->end - buffer->start), access.by.text().c_str());
  }
  const size_t shadow_bytes = buffer->num_cells() * sizeof(Cell);
  if (access.is_write && !buffer->shadow)
    buffer->shadow = static_cast<Cell*>(map_zeros(shadow_bytes));
  if (!buffer->shadow) return;  // what this launch only reads has no races
  if (buffer->launch != worker->launch->serial) {
    madvise(buffer->shadow, shadow_bytes, MADV_DONTNEED);
    buffer->launch = worker->launch->serial;
  }
  access.space = "global";
  access.name = buffer->name.c_str();
  const size_t offset = address - buffer->start;
  check_cells(buffer->shadow, offset, bytes, access, offset);
}

static void check(const void* at, size_t bytes, bool is_aligned, Access access) {
  const uintptr_t address = uintptr_t(at);
  if (address - uintptr_t(fiber->stack) < kStackBytes) return;
  if (is_aligned && (address & (bytes - 1)))
    fail("misaligned %zu-byte %s (%s)", bytes, access.verb(), access.by.text().c_str());
  if (address - uintptr_t(worker->arena) < kArenaBytes)
    check_shared(address, bytes, access);
  else
    check_global(address, bytes, access);
}

void note_access(const void* at, size_t bytes, bool is_write, bool is_atomic, Site site) {
  if (is_checked) check(at, bytes, is_atomic, {is_write, is_atomic, {0, &site}, "", ""});
}

static void check_hook(const void* at, size_t bytes, bool is_write, bool is_aligned,
                       uintptr_t return_address) {
  if (fiber) check(at, bytes, is_aligned, {is_write, false, {return_address, nullptr}, "", ""});
}

}  // namespace emulator

extern "C" {

// Memory of the device, poisoned. It ends right before memory that nobody may touch.
void* emulator_alloc(size_t bytes, const char* name) {
  constexpr size_t kPage = 4096;
  const size_t rounded = (bytes + 15) / 16 * 16;
  const size_t body = std::max((rounded + kPage - 1) / kPage * kPage, kPage);
  auto* mapping = static_cast<uint8_t*>(emulator::map_zeros(body + 2 * kPage));
  mprotect(mapping, kPage, PROT_NONE);
  mprotect(mapping + kPage + body, kPage, PROT_NONE);
  // Large memory is left as it comes, zeros: to poison it would be to fill it.
  if (body <= (64 << 20)) memset(mapping + kPage, emulator::kPoison, body);
  uint8_t* start = mapping + kPage + body - rounded;
  auto* is_written = static_cast<uint8_t*>(emulator::is_checked ? emulator::map_zeros(rounded) : nullptr);
  auto* buffer = new emulator::Buffer{uintptr_t(start), uintptr_t(start) + bytes, name, mapping,
                                      body + 2 * kPage, is_written, nullptr, 0, 0, 0};
  std::unique_lock<std::shared_mutex> guard(emulator::buffers_mutex);
  emulator::buffers[uintptr_t(start) + rounded] = buffer;
  return start;
}

void emulator_free(void* at, size_t bytes) {
  const size_t rounded = (bytes + 15) / 16 * 16;
  std::unique_lock<std::shared_mutex> guard(emulator::buffers_mutex);
  auto found = emulator::buffers.find(uintptr_t(at) + rounded);
  if (found == emulator::buffers.end()) return;
  emulator::Buffer* buffer = found->second;
  emulator::buffers.erase(found);
  if (buffer->is_written) munmap(buffer->is_written, rounded);
  if (buffer->shadow) munmap(buffer->shadow, buffer->num_cells() * sizeof(emulator::Cell));
  munmap(buffer->mapping, buffer->mapping_bytes);
  delete buffer;
}

// Others than kernels wrote here.
void emulator_note_write(const void* at, size_t bytes) {
  const emulator::Buffer* buffer = emulator::buffer_at(uintptr_t(at));
  if (buffer && buffer->is_written)
    memset(buffer->is_written + (uintptr_t(at) - buffer->start), 1, bytes);
}

// What kernels have read of the buffers of a name, and written, where accesses are checked.
uint64_t emulator_bytes_read(const char* name) {
  std::shared_lock<std::shared_mutex> guard(emulator::buffers_mutex);
  uint64_t bytes = 0;
  for (const auto& [end, buffer] : emulator::buffers)
    if (buffer->name == name) bytes += buffer->bytes_read;
  return bytes;
}
uint64_t emulator_bytes_written(const char* name) {
  std::shared_lock<std::shared_mutex> guard(emulator::buffers_mutex);
  uint64_t bytes = 0;
  for (const auto& [end, buffer] : emulator::buffers)
    if (buffer->name == name) bytes += buffer->bytes_written;
  return bytes;
}

// The hooks. Compilers call them from code that was compiled with -fsanitize=thread.
#define RETURN_ADDRESS uintptr_t(__builtin_return_address(0))
void __tsan_init() { emulator::is_checked = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define HOOKS(bytes)                                                                              \
  void __tsan_read##bytes(void* at) {                                                             \
    emulator::check_hook(at, bytes, false, true, RETURN_ADDRESS);                                 \
  }                                                                                               \
  void __tsan_write##bytes(void* at) {                                                            \
    emulator::check_hook(at, bytes, true, true, RETURN_ADDRESS);                                  \
  }                                                                                               \
  void __tsan_unaligned_read##bytes(void* at) {                                                   \
    emulator::check_hook(at, bytes, false, false, RETURN_ADDRESS);                                \
  }                                                                                               \
  void __tsan_unaligned_write##bytes(void* at) {                                                  \
    emulator::check_hook(at, bytes, true, false, RETURN_ADDRESS);                                 \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* at, unsigned long bytes) {
  emulator::check_hook(at, bytes, false, false, RETURN_ADDRESS);
}
void __tsan_write_range(void* at, unsigned long bytes) {
  emulator::check_hook(at, bytes, true, false, RETURN_ADDRESS);
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes) {
    emulator::check_hook(from, bytes, false, false, RETURN_ADDRESS);
    emulator::check_hook(to, bytes, true, false, RETURN_ADDRESS);
  }
  return memcpy(to, from, bytes);
}
void* __tsan_memset(void* at, int value, size_t bytes) {
  if (bytes) emulator::check_hook(at, bytes, true, false, RETURN_ADDRESS);
  return memset(at, value, bytes);
}
}
