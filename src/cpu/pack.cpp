// Packing: one task takes four panels of one segment, reads their rows and writes their words.
#include "cpu/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>

#include "base/arena.h"
#include "base/error.h"
#include "quant/quantize.h"

namespace camelid::cpu {
namespace {

// Four panels at a time: 64 neighbouring rows of a transposed bf16 source are two whole cache
// lines.
constexpr std::int64_t kPanelsPerTask = 4;
constexpr std::size_t kAlign = 64;

// Where one segment's parts are to be written, and from what.
struct Job {
  const LinearSource* source;
  Segment segment;
  bool verbatim;                              // the source's own words, scales and zero points
  std::size_t words_at, scales_at, zeros_at;  // offsets into the storage
  std::uint32_t* words;
  std::byte* scales;
  std::uint8_t* zeros;
};

std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Whether the source's rows are the words of the format already.
bool holds_format(const LinearSource& source, WeightFormat format) {
  if (source.bits != 0) {
    return (format == WeightFormat::kInt4 && source.bits == 4) ||
           (format == WeightFormat::kInt8 && source.bits == 8);
  }
  return source.col_stride == 1 &&
         ((format == WeightFormat::kBf16 && source.dtype == DType::kBf16) ||
          (format == WeightFormat::kF16 && source.dtype == DType::kF16) ||
          (format == WeightFormat::kF32 && source.dtype == DType::kF32));
}

void set_groups(Job& job, const PackOptions& options) {
  Segment& s = job.segment;
  const FormatInfo& info = format_info(s.format);
  const std::int64_t wanted = job.verbatim ? job.source->group_size : options.group_size;
  s.group_size = wanted <= 0 || wanted >= s.in_dim ? s.in_dim : wanted;
  s.n_groups = ceil_div(s.in_dim, s.group_size);
  s.scale_dtype = job.verbatim ? job.source->scale_dtype : DType::kBf16;
  if (s.n_groups > 1 && s.group_size % info.values_per_word() != 0) {
    fail(ErrorCode::kUnsupported, "[weights] ", job.source->name, " in ", job.source->file,
         " has groups of ", s.group_size, " values, expected a multiple of ",
         info.values_per_word(), " for ", info.name, ".");
  }
}

Job describe(const LinearSource& source, const PackOptions& options, std::int64_t first_out) {
  const FormatInfo& info = format_info(options.format);
  Job job{};
  job.source = &source;
  job.verbatim = holds_format(source, options.format);
  Segment& s = job.segment;
  s.format = options.format;
  s.out_dim = source.out_dim;
  s.in_dim = source.in_dim;
  s.first_out = first_out;
  s.n_panels = ceil_div(s.out_dim, kPanelRows);
  s.n_words = ceil_div(s.in_dim, info.values_per_word());
  if (info.scaled) set_groups(job, options);
  return job;
}

// Gives the parts of a job their offsets; returns where the next job begins.
std::size_t place(Job& job, std::size_t at) {
  const Segment& s = job.segment;
  const auto group_lanes = static_cast<std::size_t>(s.n_panels * s.n_groups * kPanelRows);
  job.words_at = at;
  at += aligned(static_cast<std::size_t>(s.n_panels * s.n_words * kPanelRows) * 4);
  job.scales_at = at;
  at += aligned(group_lanes * dtype_bytes(s.scale_dtype));
  job.zeros_at = at;
  if (job.verbatim && job.source->zero_points != nullptr) at += aligned(group_lanes);
  return at;
}

void bind(Job& job, std::byte* storage) {
  Segment& s = job.segment;
  job.words = reinterpret_cast<std::uint32_t*>(storage + job.words_at);
  s.words = job.words;
  if (s.n_groups == 0) return;
  job.scales = storage + job.scales_at;
  s.scales = job.scales;
  if (job.verbatim && job.source->zero_points != nullptr) {
    job.zeros = reinterpret_cast<std::uint8_t*>(storage + job.zeros_at);
    s.zeros = job.zeros;
  }
}

// What one worker needs to read rows and convert them.
struct Worker {
  const Kernels* kernels;
  std::vector<float> rows;
  std::vector<std::int32_t> words;
  std::vector<std::uint16_t> scales;
};

// Where a panel's parts go.
std::uint32_t* words_of(const Job& job, std::int64_t panel) {
  return job.words + panel * job.segment.n_words * kPanelRows;
}

void* scales_of(const Job& job, std::int64_t panel) {
  const Segment& s = job.segment;
  return job.scales +
         static_cast<std::size_t>(panel * s.n_groups * kPanelRows) * dtype_bytes(s.scale_dtype);
}

// Rows [first_row, first_row + n_rows) of a dense matrix.
PackRows dense_rows(const void* matrix, std::int64_t first_row, std::int64_t n_rows,
                    std::int64_t row_bytes) {
  return {static_cast<const std::byte*>(matrix) + first_row * row_bytes, row_bytes, row_bytes,
          n_rows};
}

void pack_zeros(const Job& job, std::int64_t panel, std::int64_t first_row, std::int64_t n_rows) {
  std::uint8_t* zeros = job.zeros + panel * job.segment.n_groups * kPanelRows;
  for (std::int64_t g = 0; g < job.segment.n_groups; ++g) {
    for (std::int64_t lane = 0; lane < n_rows; ++lane) {
      zeros[g * kPanelRows + lane] =
          static_cast<std::uint8_t>(zero_point(*job.source, first_row + lane, g));
    }
  }
}

// Numbers that are not finite are looked for again by the readers of quantize.h, which say where
// they are.
void pack_verbatim(const Job& job, std::int64_t panel, std::int64_t first_row, std::int64_t n_rows,
                   Worker& worker) {
  const Kernels& kernels = *worker.kernels;
  const Segment& s = job.segment;
  const LinearSource& source = *job.source;
  if (s.n_groups == 0) {
    const auto bytes = static_cast<std::int64_t>(dtype_bytes(source.dtype));
    PackRows rows = dense_rows(source.data, first_row, n_rows, source.row_stride * bytes);
    rows.n_bytes = s.in_dim * bytes;
    if (kernels.pack_words(words_of(job, panel), rows, s.format)) return;
    worker.rows.resize(static_cast<std::size_t>(n_rows * s.in_dim));
    read_rows(source, first_row, n_rows, worker.rows.data());
    return;
  }
  const auto scale_bytes = static_cast<std::int64_t>(dtype_bytes(s.scale_dtype));
  const PackRows scales = dense_rows(source.scales, first_row, n_rows, s.n_groups * scale_bytes);
  if (!kernels.pack_scales(scales_of(job, panel), scales, s.scale_dtype)) {
    worker.rows.resize(static_cast<std::size_t>(n_rows * s.n_groups));
    read_scales(source, first_row, n_rows, worker.rows.data());
  }
  kernels.pack_words(words_of(job, panel),
                     dense_rows(source.words, first_row, n_rows, s.n_words * 4), s.format);
  if (job.zeros != nullptr) pack_zeros(job, panel, first_row, n_rows);
}

void pack_quantised(const Job& job, std::int64_t panel, const float* rows, std::int64_t n_rows,
                    Worker& worker) {
  const Segment& s = job.segment;
  worker.words.resize(static_cast<std::size_t>(n_rows * s.n_words));
  worker.scales.resize(static_cast<std::size_t>(n_rows * s.n_groups));
  quantize_rows(rows, n_rows, s.in_dim, format_info(s.format).bits, s.group_size,
                worker.words.data(), worker.scales.data());
  worker.kernels->pack_words(words_of(job, panel),
                             dense_rows(worker.words.data(), 0, n_rows, s.n_words * 4), s.format);
  worker.kernels->pack_scales(scales_of(job, panel),
                              dense_rows(worker.scales.data(), 0, n_rows, s.n_groups * 2),
                              s.scale_dtype);
}

// f32_to_bf16 without its NaN branch: read_rows has refused NaN.
std::uint16_t finite_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Two 16-bit values to a word, an odd tail filled with zero.
template <class Convert>
void join_halves(const float* row, std::int64_t n, std::int32_t* out, Convert convert) {
  for (std::int64_t i = 0; i + 1 < n; i += 2) {
    const auto low = static_cast<std::uint32_t>(convert(row[i]));
    const auto high = static_cast<std::uint32_t>(convert(row[i + 1]));
    out[i / 2] = static_cast<std::int32_t>(low | high << 16);
  }
  if (n % 2 != 0) out[n / 2] = convert(row[n - 1]);
}

void require_f16_range(const LinearSource& source, const float* row, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    if (std::fabs(row[i]) < 65520.0f) continue;  // rounds to at most 65504
    fail(ErrorCode::kUnsupported, "[weights] ", source.name, " in ", source.file, " holds ", row[i],
         ", more than f16 can; use bf16.");
  }
}

void pack_plain(const Job& job, std::int64_t panel, const float* rows, std::int64_t n_rows,
                Worker& worker) {
  const Segment& s = job.segment;
  if (s.format == WeightFormat::kF32) {
    worker.kernels->pack_words(words_of(job, panel), dense_rows(rows, 0, n_rows, s.n_words * 4),
                               s.format);
    return;
  }
  worker.words.resize(static_cast<std::size_t>(n_rows * s.n_words));
  for (std::int64_t r = 0; r < n_rows; ++r, rows += s.in_dim) {
    std::int32_t* words = worker.words.data() + r * s.n_words;
    if (s.format == WeightFormat::kBf16) {
      join_halves(rows, s.in_dim, words, finite_to_bf16);
    } else {
      require_f16_range(*job.source, rows, s.in_dim);
      join_halves(rows, s.in_dim, words, f32_to_f16);
    }
  }
  worker.kernels->pack_words(words_of(job, panel),
                             dense_rows(worker.words.data(), 0, n_rows, s.n_words * 4), s.format);
}

// The largest block of activations that never meets two scales of a weight row, up to 128 inputs:
// int8 needs a scale of its own where the numbers around it are much larger. 0: activations stay
// float, since a segment is plain, or two have different groups.
std::int64_t activation_block(const std::vector<Segment>& segments) {
  constexpr std::int64_t kBlock = 128;
  // A block's products with bytes below 256 must not leave 32 bits.
  constexpr std::int64_t kMostInputs = 1 << 15;
  std::int64_t block = 0;
  for (const Segment& s : segments) {
    if (s.n_groups == 0) return 0;
    const bool divides = s.n_groups == 1 || s.group_size % kBlock == 0;
    const std::int64_t wanted = divides ? kBlock : s.group_size;
    if (wanted > kMostInputs || (block != 0 && block != wanted)) return 0;
    block = wanted;
  }
  return block;
}

void pack_panels(const Job& job, std::int64_t first_panel, Worker& worker) {
  const Segment& s = job.segment;
  const std::int64_t end_panel = std::min(first_panel + kPanelsPerTask, s.n_panels);
  const std::int64_t first_row = first_panel * kPanelRows;
  const std::int64_t end_row = std::min(end_panel * kPanelRows, s.out_dim);
  if (!job.verbatim) {
    worker.rows.resize(static_cast<std::size_t>((end_row - first_row) * s.in_dim));
    read_rows(*job.source, first_row, end_row - first_row, worker.rows.data());
  }
  for (std::int64_t panel = first_panel; panel < end_panel; ++panel) {
    const std::int64_t row = panel * kPanelRows;
    const std::int64_t n_rows = std::min(kPanelRows, end_row - row);
    const float* rows = worker.rows.data() + (row - first_row) * s.in_dim;
    if (job.verbatim) {
      pack_verbatim(job, panel, row, n_rows, worker);
    } else if (s.n_groups != 0) {
      pack_quantised(job, panel, rows, n_rows, worker);
    } else {
      pack_plain(job, panel, rows, n_rows, worker);
    }
  }
}

}  // namespace

std::unique_ptr<PackedMatrix> pack_matrix(std::span<const LinearSource> stack,
                                          std::span<const PackOptions> options,
                                          const Kernels& kernels, ThreadPool& pool) {
  auto matrix = std::make_unique<PackedMatrix>();
  std::vector<Job> jobs;
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < stack.size(); ++i) {
    if (stack[i].in_dim != stack[0].in_dim || stack[i].in_dim <= 0 || stack[i].out_dim <= 0) {
      fail(ErrorCode::kCheckpoint, "[weights] ", stack[i].name, " in ", stack[i].file, " is [",
           stack[i].out_dim, ", ", stack[i].in_dim, "], expected at least one row of ",
           stack[0].in_dim, " values like its neighbours.");
    }
    jobs.push_back(describe(stack[i], options[i], matrix->out_dim));
    bytes = place(jobs.back(), bytes);
    matrix->out_dim += stack[i].out_dim;
  }
  matrix->in_dim = stack.empty() ? 0 : stack[0].in_dim;
  matrix->bytes = bytes;
  matrix->storage = {map_memory(bytes), bytes};
  std::vector<std::pair<const Job*, std::int64_t>> tasks;
  for (Job& job : jobs) {
    bind(job, static_cast<std::byte*>(matrix->storage.data.get()));
    matrix->segments.push_back(job.segment);
    for (std::int64_t p = 0; p < job.segment.n_panels; p += kPanelsPerTask) {
      tasks.emplace_back(&job, p);
    }
  }
  matrix->activation_block = activation_block(matrix->segments);
  matrix->plain_bf16 = true;
  for (const Segment& s : matrix->segments) {
    matrix->plain_bf16 = matrix->plain_bf16 && s.format == WeightFormat::kBf16;
  }
  for (const PackOptions& o : options) matrix->precise = matrix->precise || o.precise;
  std::vector<Worker> workers(static_cast<std::size_t>(pool.n_threads()),
                              Worker{&kernels, {}, {}, {}});
  pool.parallel_for(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i, int worker) {
    const auto& [job, panel] = tasks[static_cast<std::size_t>(i)];
    pack_panels(*job, panel, workers[static_cast<std::size_t>(worker)]);
  });
  return matrix;
}

}  // namespace camelid::cpu
