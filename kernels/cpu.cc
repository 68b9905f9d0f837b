// Kernels for XLA's CPU backend, called through its FFI (see cpu.py): a product
// of rows with weights packed in panels; attention of decode rows and of
// prompts, which read KV pages where they are; copies of pages. Arithmetic is
// float32, in one order whatever the batch and the threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16, kVectors = 3, kRows = 8;  // 24 of 32 registers
#else
constexpr int kLanes = 8, kVectors = 2, kRows = 6;  // 12 of 16
#endif
constexpr int kPanel = kLanes * kVectors;
constexpr int kBlock = 192;  // queries of a prompt that share a kv head
constexpr int64_t kPart = 8 * kRows;  // rows of a product that are one task
constexpr int64_t kHeld = 1 << 18;  // numbers of rows that stay in a core's L2
constexpr float kNever = -1e30f;
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes), aligned(2)));
typedef uint32_t Word __attribute__((vector_size(4 * kLanes), aligned(4)));

Vec load(const float* at) { return *reinterpret_cast<const Vec*>(at); }
Vec load(const uint16_t* at) {  // bfloat16
#ifdef __AVX512F__  // GCC 12 would widen it by halves
  Word bits = reinterpret_cast<Word>(_mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#else
  Word bits = __builtin_convertvector(*reinterpret_cast<const Half*>(at), Word);
#endif
  return reinterpret_cast<Vec>(bits << 16);
}
float value(float x) { return x; }
float value(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
float total(Vec x) {
  float part[kLanes];
  std::memcpy(part, &x, sizeof(x));
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// e^x for x <= 0, to 2 units in the last place.
Vec exp_below(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  Int power = __builtin_convertvector(x * 1.44269504f - 0.5f, Int);
  Vec whole = __builtin_convertvector(power, Vec);
  Vec r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  Vec y = Vec{} + 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                  1.6666665459e-1f, 5.0000001201e-1f})
    y = y * r + c;
  return (y * r * r + r + 1.0f) * reinterpret_cast<Vec>((power + 127) << 23);
}

// Calls body(0) .. body(n - 1) on XLA's pool. The caller may be on the pool
// itself, so it waits for no helper to begin: one that comes late finds
// nothing left, and what it needs to see that outlives this call.
void parallel(ffi::ThreadPool& pool, int64_t n,
              std::function<void(int64_t)> body) {
  struct Work {
    std::function<void(int64_t)> body;
    std::atomic<int64_t> next{0}, done{0};
  };
  auto work = std::make_shared<Work>();
  work->body = std::move(body);
  std::function<void()> run = [work, n] {
    for (int64_t i; (i = work->next.fetch_add(1)) < n;) {
      work->body(i);
      work->done.fetch_add(1, std::memory_order_release);
    }
  };
  // The pool may have more threads than there are cores: for collectives.
  static const int64_t cores = std::thread::hardware_concurrency();
  const int64_t helpers = std::min<int64_t>({pool.num_threads(), n, cores}) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(run)(run));
  run();
  while (work->done.load(std::memory_order_acquire) < n)
    std::this_thread::yield();
}

// y[r, :n] = sum_i x[r, i] w[i, :n] for R rows, n = V kLanes; added to y if
// `more`. across, width: from a row of x, of y, to the next; stride: of w. It
// prefetches `ahead` meanwhile, `step` on an i. No loops over the sums, and row
// by row: GCC 12 would keep some in memory. `once`: vector by vector, as
// weights that come from memory come late.
template <int R, int V, bool once, typename W, size_t... I>
void tile(std::index_sequence<I...>, const W* w, const float* x, float* y,
          int64_t inner, int64_t across, int64_t stride, int64_t width,
          bool more, const W* ahead, int64_t step) {
  constexpr int r[] = {(once ? I % R : I / V)...};
  constexpr int v[] = {(once ? I / R : I % V) * kLanes...};
  Vec sum[R * V];
  if (more)
    ((sum[I] = load(y + r[I] * width + v[I])), ...);
  else
    ((sum[I] = Vec{}), ...);
  for (int64_t i = 0; i < inner; ++i, w += stride, ahead += step) {
    __builtin_prefetch(ahead);
    ((sum[I] += x[r[I] * across + i] * load(w + v[I])), ...);
  }
  ((*reinterpret_cast<Vec*>(y + r[I] * width + v[I]) = sum[I]), ...);
}

// The same of up to kRows rows and kVectors vectors.
template <typename W, int R = kRows, int V = kVectors, typename... Rest>
void small(int64_t count, int64_t vectors, bool once, const W* w,
           Rest... rest) {
  if constexpr (V > 1)
    if (vectors < V)
      return small<W, R, V - 1>(count, vectors, once, w, rest...);
  if constexpr (R > 1)
    if (count < R)
      return small<W, R - 1, V>(count, vectors, once, w, rest...);
  const auto sums = std::make_index_sequence<R * V>();
  if (R < kRows || once)
    tile<R, V, true, W>(sums, w, rest...);
  else
    tile<R, V, R < kRows, W>(sums, w, rest...);
}

// The same of any number of both. next: the weights that are read after these,
// brought here by the first tiles; or null, as of what is read only once.
template <typename W>
void product(int64_t count, int64_t vectors, const float* x, const W* w,
             float* y, int64_t inner, int64_t across, int64_t stride,
             int64_t width, bool more = false, const W* next = nullptr) {
  constexpr int64_t line = 64 / sizeof(W);
  const int64_t parts = (vectors + kVectors - 1) / kVectors;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t v = vectors * part / parts;
    const W* here = w + v * kLanes;
    for (int64_t r = 0; r < count; r += kRows) {
      const bool early = next && r < kVectors * kRows;
      small<W>(std::min<int64_t>(kRows, count - r),
               vectors * (part + 1) / parts - v, count <= kRows, here,
               x + r * across,
               y + r * width + v * kLanes, inner, across, stride, width, more,
               early ? next + r / kRows * inner * line : here + 24 * stride,
               early ? line : stride);
    }
  }
}

// A task is a few rows and a panel. Those of a group of rows that stay in the
// cache come panel by panel, so that a panel is read once a group.
ffi::Error Multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_SI,
                    ffi::AnyBuffer w_QIp, ffi::ResultBuffer<ffi::F32> y_SO) {
  const int64_t count = x_SI.dimensions()[0], panels = w_QIp.dimensions()[0];
  const int64_t inner = w_QIp.dimensions()[1], width = panels * kPanel;
  if (w_QIp.dimensions()[2] != kPanel || x_SI.dimensions()[1] != inner)
    return ffi::Error::InvalidArgument("panels of another build or size");
  const int64_t parts = (count + kPart - 1) / kPart;
  const int64_t group =
      std::max<int64_t>(1, kHeld / kPart / std::max<int64_t>(1, inner));
  auto run = [&](auto number) {
    const auto* w = static_cast<const decltype(number)*>(w_QIp.untyped_data());
    parallel(pool, parts * panels, [&](int64_t task) {
      const int64_t first = task / (group * panels) * group;
      const int64_t size = std::min(group, parts - first);
      const int64_t at = task - first * panels, p = at / size;
      const int64_t row = (first + at % size) * kPart;
      const auto* panel = w + p * inner * kPanel;
      product(std::min(kPart, count - row), kVectors,
              x_SI.typed_data() + row * inner, panel,
              y_SO->typed_data() + row * width + p * kPanel, inner, inner,
              kPanel, width, false,
              size > 1 && p + 1 < panels ? panel + inner * kPanel : nullptr);
    });
  };
  w_QIp.element_type() == ffi::F32 ? run(0.0f) : run(uint16_t{});
  return ffi::Error::Success();
}

template <typename T>
struct Pages {
  const T* data;
  int64_t heads, pages, size, width;

  // An id that no page has is taken for one that a page has.
  const T* at(int64_t head, int64_t id) const {
    id = std::clamp<int64_t>(id, 0, pages - 1);
    return data + (head * pages + id) * size * width;
  }

  // body(first token, how many, where they lie) of each page's, in order. The
  // next page is on its way when one is read.
  template <typename Body>
  void each(int64_t head, const int32_t* table, int64_t from, int64_t to,
            Body body) const {
    while (from < to) {
      const int64_t entry = from / size, skip = from - entry * size;
      const int64_t count = std::min(to - from, size - skip);
      if (from + count < to)
        for (int64_t i = 0; i < size * width; i += 64 / sizeof(T))
          __builtin_prefetch(at(head, table[entry + 1]) + i);
      body(from, count, at(head, table[entry]) + skip * width);
      from += count;
    }
  }
};

// exp(row - top) of tokens from .. to - 1, zeros elsewhere; their sum.
float softmax(float* row, int64_t from, int64_t to, int64_t padded) {
  const int64_t first = from / kLanes * kLanes;
  const int64_t last = (to + kLanes - 1) / kLanes * kLanes;
  std::fill(row + first, row + from, kNever);
  std::fill(row + to, row + last, kNever);
  Vec most = Vec{} + kNever, sum = {};
  for (int64_t t = first; t < last; t += kLanes)
    most = most > load(row + t) ? most : load(row + t);
  float top = kNever;
  for (int i = 0; i < kLanes; ++i) top = std::max(top, most[i]);
  for (int64_t t = first; t < last; t += kLanes) {
    Vec weight = exp_below(load(row + t) - top);
    *reinterpret_cast<Vec*>(row + t) = weight;
    sum += weight;  // e^-87 of what pads: nothing beside the largest, 1
  }
  std::fill(row, row + from, 0.0f);
  std::fill(row + to, row + padded, 0.0f);
  return total(sum);
}

// Queries [count, heads, width] of a sequence, behind `pos` tokens, with the kv
// head that `group` of them share. One token's scores are dot products; those
// of more are products with keys in panels.
template <typename T>
void attend(const float* q, Pages<T> keys, Pages<T> values,
            const int32_t* table, int64_t head, int64_t heads, int64_t count,
            int64_t pos, float scale, float softcap, int64_t window,
            float* out) {
  const int64_t width = keys.width, group = heads / keys.heads;
  const int64_t begin = window ? std::max<int64_t>(0, pos + 1 - window) : 0;
  const int64_t end = pos + count, all = count * group;
  const int64_t padded = (end - begin + kPanel - 1) / kPanel * kPanel;
  const int64_t vectors = (width + kLanes - 1) / kLanes;
  const int64_t wide = vectors * kLanes;
  static thread_local std::vector<float> query, panel, scores, held, result;
  query.assign(all * wide, 0);
  scores.resize(all * padded);
  result.assign(all * wide, 0);
  auto at = [=](int64_t r) {
    return (r / group * heads + head * group + r % group) * width;
  };
  for (int64_t r = 0; r < all; ++r)
    for (int64_t h = 0; h < width; ++h)
      query[r * wide + h] = scale * q[at(r) + h];
  if (count > 1) {
    panel.resize(width * kPanel);
    int64_t filled = 0;
    auto flush = [&](int64_t to) {
      const int64_t t = begin + to - filled;  // no row before `r` sees it
      const int64_t r = std::max<int64_t>(0, t - pos) * group / kRows * kRows;
      product(all - r, kVectors, query.data() + r * wide, panel.data(),
              scores.data() + r * padded + to - filled, width, wide, kPanel,
              padded);
      filled = 0;
    };
    keys.each(head, table, begin, end, [&](int64_t t, int64_t n, const T* key) {
      for (int64_t i = 0; i < n; ++i, key += width) {
        for (int64_t h = 0; h < width; ++h)
          panel[h * kPanel + filled] = value(key[h]);
        if (++filled == kPanel) flush(t + i + 1 - begin);
      }
    });
    if (filled) flush(end - begin);
  } else {
    const int64_t whole = width - width % kLanes;
    keys.each(head, table, begin, end, [&](int64_t t, int64_t n, const T* key) {
      for (int64_t i = 0; i < n; ++i, key += width)
        for (int64_t r = 0; r < all; ++r) {
          Vec sum = {};
          for (int64_t h = 0; h < whole; h += kLanes)
            sum += load(query.data() + r * wide + h) * load(key + h);
          float score = total(sum);
          for (int64_t h = whole; h < width; ++h)
            score += query[r * wide + h] * value(key[h]);
          scores[r * padded + t + i - begin] = score;
        }
    });
  }
  if (softcap)
    for (float& score : scores) score = softcap * std::tanh(score / softcap);
  std::vector<float> sums(all);
  for (int64_t r = 0; r < all; ++r) {
    const int64_t to = pos + r / group + 1;
    const int64_t from = window ? std::max<int64_t>(0, to - window) : 0;
    sums[r] = softmax(scores.data() + r * padded, from - begin, to - begin,
                      padded);
  }
  auto weigh = [&](int64_t t, int64_t n, const auto* v) {
    for (int64_t r = 0; r < all; r += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, all - r);
      const int64_t seen = std::min(n, pos + (r + rows - 1) / group + 1 - t);
      const float* weight = scores.data() + r * padded + t - begin;
      float* to = result.data() + r * wide;
      product(rows, width / kLanes, weight, v, to, seen, padded, width, wide,
              true);
      for (int64_t h = width / kLanes * kLanes; h < width; ++h)
        for (int64_t k = 0; k < rows; ++k)
          for (int64_t i = 0; i < seen; ++i)
            to[k * wide + h] += weight[k * padded + i] *
                                value(v[i * width + h]);
    }
  };
  if (count > 1) {
    held.resize((end - begin) * width);
    values.each(head, table, begin, end, [&](int64_t t, int64_t n, const T* v) {
      std::transform(v, v + n * width, held.data() + (t - begin) * width,
                     [](T x) { return value(x); });
    });
    weigh(begin, end - begin, held.data());
  } else {
    values.each(head, table, begin, end, weigh);
  }
  for (int64_t r = 0; r < all; ++r)
    for (int64_t h = 0; h < width; ++h)
      out[at(r) + h] = result[r * wide + h] / sums[r];
}

// Sequence b has rows start[b] .. start[b + 1] - 1, behind pos[b] tokens. Where
// they are more than there are rows, or tokens in its table, numbers are wrong;
// no other memory is read or written.
ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q_SNH,
                  ffi::AnyBuffer k_KPCH, ffi::AnyBuffer v_KPCH,
                  ffi::Buffer<ffi::S32> table_BM, ffi::Buffer<ffi::S32> start_A,
                  ffi::Buffer<ffi::S32> pos_B,
                  ffi::ResultBuffer<ffi::F32> o_SNH, float scale,
                  float softcap, int64_t window) {
  const auto shape = k_KPCH.dimensions();
  const int64_t rows = q_SNH.dimensions()[0], heads = q_SNH.dimensions()[1];
  const int64_t row = heads * shape[3], kv_heads = shape[0];
  const int64_t entries = table_BM.dimensions()[1], tokens = entries * shape[2];
  const int64_t most = std::max<int64_t>(1, kBlock * kv_heads / heads);
  struct Block { const int32_t* table; int64_t first, count, pos; };
  std::vector<Block> blocks;
  int64_t end = 0;
  for (int64_t b = 0; b < pos_B.dimensions()[0]; ++b) {
    const int32_t* start = start_A.typed_data() + b;
    const int64_t begin = std::clamp<int64_t>(start[0], end, rows);
    end = std::clamp<int64_t>(start[1], begin, std::min(rows, begin + tokens));
    const int64_t pos = std::clamp<int64_t>(pos_B.typed_data()[b], 0,
                                            tokens - (end - begin));
    for (int64_t i = begin; i < end; i += most)
      blocks.push_back({table_BM.typed_data() + b * entries, i,
                        std::min(most, end - i), pos + i - begin});
  }
  float* out = o_SNH->typed_data();
  std::fill(out + end * row, out + rows * row, 0.0f);
  auto run = [&](auto number) {
    auto pages = [&](const ffi::AnyBuffer& x) {
      return Pages<decltype(number)>{
          static_cast<const decltype(number)*>(x.untyped_data()), kv_heads,
          shape[1], shape[2], shape[3]};
    };
    parallel(pool, blocks.size() * kv_heads, [&](int64_t task) {
      // The last ones see the most tokens, so they go first.
      const Block& block = blocks[blocks.size() - 1 - task / kv_heads];
      attend(q_SNH.typed_data() + block.first * row, pages(k_KPCH),
             pages(v_KPCH), block.table, task % kv_heads, heads, block.count,
             block.pos, scale, softcap, window, out + block.first * row);
    });
  };
  k_KPCH.element_type() == ffi::F32 ? run(0.0f) : run(uint16_t{});
  return ffi::Error::Success();
}

// As memcpy, past the caches where the processor can: a line that is written
// whole is not read first. `fence` makes it seen.
void copy(char* to, const char* from, int64_t bytes) {
#ifdef __SSE2__
  if (bytes % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (int64_t i = 0; i < bytes; i += 16)
      _mm_stream_si128(
          reinterpret_cast<__m128i*>(to + i),
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}
void fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Copies pages ids[0], ids[1], ... of every pool, up to an id that is none's,
// to `room` or back: [heads, ids, bytes of a page] of each pool in turn.
template <typename Pool>
ffi::Error copy_pages(ffi::ThreadPool& threads,
                      const ffi::Buffer<ffi::S32>& ids, ffi::AnyBuffer room,
                      size_t pools, Pool pool, bool back) {
  struct Run { char* pages; char* room; int64_t bytes; };
  std::vector<Run> runs;  // a head of a pool each
  const int32_t *first = ids.typed_data(), *last = first + ids.element_count();
  char* at = static_cast<char*>(room.untyped_data());
  const char* end = at + room.size_bytes();
  for (size_t i = 0; i < pools; ++i) {
    const ffi::AnyBuffer x = pool(i);
    const int64_t heads = x.dimensions()[0], pages = x.dimensions()[1];
    last = std::find_if(first, last, [=](int32_t id) {
      return id < 0 || id >= pages;
    });
    const int64_t bytes = x.size_bytes() / (heads * pages);
    if (heads * (last - first) * bytes > end - at)
      return ffi::Error::InvalidArgument("more pages than there is room for");
    for (int64_t head = 0; head < heads; ++head) {
      runs.push_back({static_cast<char*>(x.untyped_data()) +
                      head * pages * bytes, at, bytes});
      at += (last - first) * bytes;
    }
  }
  parallel(threads, runs.size(), [&](int64_t i) {
    const auto& [pages, room, bytes] = runs[i];
    for (const int32_t* id = first; id < last; ++id) {
      char *page = pages + *id * bytes, *place = room + (id - first) * bytes;
      copy(back ? page : place, back ? place : page, bytes);
    }
    fence();
  });
  return ffi::Error::Success();
}

ffi::Error Gather(ffi::ThreadPool threads, ffi::Buffer<ffi::S32> ids,
                  ffi::AnyBuffer room, ffi::RemainingArgs pools,
                  ffi::ResultBuffer<ffi::S32> done) {
  *done->typed_data() = 1;
  return copy_pages(threads, ids, room, pools.size(), [&](size_t i) {
    return *pools.get<ffi::AnyBuffer>(i);
  }, false);
}

ffi::Error Scatter(ffi::ThreadPool threads, ffi::Buffer<ffi::S32> ids,
                   ffi::AnyBuffer room, ffi::RemainingArgs,  // their aliases
                   ffi::RemainingRets pools) {
  return copy_pages(threads, ids, room, pools.size(), [&](size_t i) {
    return **pools.get<ffi::AnyBuffer>(i);
  }, true);
}

}  // namespace

extern "C" int dsjax_panel() { return kPanel; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dsjax_multiply, Multiply,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dsjax_attend, Attend,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Ret<ffi::Buffer<ffi::F32>>().Attr<float>("scale")
        .Attr<float>("softcap").Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dsjax_gather, Gather,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::AnyBuffer>().RemainingArgs()
        .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dsjax_scatter, Scatter,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());
