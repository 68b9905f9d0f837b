// Three kernels for XLA's CPU backend, called through its FFI (see cpu.py): a
// product of rows with weights packed in panels, and attention of decode rows
// and of prompts, which read KV pages where they are. Arithmetic is float32, in
// one order whatever the batch and the threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

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
constexpr float kNever = -1e30f;
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes), aligned(2)));
typedef uint32_t Word __attribute__((vector_size(4 * kLanes), aligned(4)));

Vec load(const float* at) { return *reinterpret_cast<const Vec*>(at); }
Vec load(const uint16_t* at) {  // bfloat16
  Word bits = __builtin_convertvector(*reinterpret_cast<const Half*>(at), Word);
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
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), n) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(run));
  run();
  while (work->done.load(std::memory_order_acquire) < n)
    std::this_thread::yield();
}

// y[r, :kPanel] = sum_i x[r, i] w[i, :kPanel], for R rows.
template <int R, typename W>
void tile(const float* x, const W* w, float* y, int64_t inner, int64_t width) {
  Vec sum[R][kVectors] = {};
  for (int64_t i = 0; i < inner; ++i) {
    const W* row = w + i * kPanel;
    __builtin_prefetch(row + 24 * kPanel);
    for (int v = 0; v < kVectors; ++v) {
      Vec weight = load(row + v * kLanes);
      for (int r = 0; r < R; ++r) sum[r][v] += x[r * inner + i] * weight;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v)
      *reinterpret_cast<Vec*>(y + r * width + v * kLanes) = sum[r][v];
}

template <typename W, int R = kRows>
void rows(int64_t count, const float* x, const W* w, float* y, int64_t inner,
          int64_t width) {
  if constexpr (R > 0) {
    if (count == R) return tile<R>(x, w, y, inner, width);
    rows<W, R - 1>(count, x, w, y, inner, width);
  }
}

template <typename W>
void multiply(ffi::ThreadPool& pool, const float* x, const W* w, float* y,
              int64_t count, int64_t panels, int64_t inner) {
  parallel(pool, panels, [=](int64_t p) {
    for (int64_t r = 0; r < count; r += kRows)
      rows<W>(std::min<int64_t>(kRows, count - r), x + r * inner,
              w + p * inner * kPanel, y + r * panels * kPanel + p * kPanel,
              inner, panels * kPanel);
  });
}

ffi::Error Multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_SI,
                    ffi::AnyBuffer w_OIp, ffi::ResultBuffer<ffi::F32> y_SO) {
  const int64_t count = x_SI.dimensions()[0];
  const int64_t panels = w_OIp.dimensions()[0], inner = w_OIp.dimensions()[1];
  if (w_OIp.dimensions()[2] != kPanel || x_SI.dimensions()[1] != inner)
    return ffi::Error::InvalidArgument("panels of another build or size");
  if (w_OIp.element_type() == ffi::F32)
    multiply(pool, x_SI.typed_data(), w_OIp.typed_data<float>(),
             y_SO->typed_data(), count, panels, inner);
  else
    multiply(pool, x_SI.typed_data(),
             static_cast<const uint16_t*>(w_OIp.untyped_data()),
             y_SO->typed_data(), count, panels, inner);
  return ffi::Error::Success();
}

template <typename T>
struct Pages {
  const T* data;
  int64_t heads, pages, size, width;

  const T* at(int64_t head, const int32_t* table, int64_t token) const {
    const int64_t page = head * pages + table[token / size];
    return data + (page * size + token % size) * width;
  }
};

// exp(row - top) of tokens from .. to - 1, zeros elsewhere; their sum.
float softmax(float* row, int64_t from, int64_t to, int64_t padded) {
  const int64_t first = from / kLanes * kLanes;
  const int64_t last = (to + kLanes - 1) / kLanes * kLanes;
  std::fill(row + first, row + from, kNever);
  std::fill(row + to, row + last, kNever);
  float top = kNever;
  for (int64_t t = from; t < to; ++t) top = std::max(top, row[t]);
  Vec sum = {};
  for (int64_t t = first; t < last; t += kLanes) {
    Vec weight = exp_below(load(row + t) - top);
    *reinterpret_cast<Vec*>(row + t) = weight;
    sum += weight;  // e^-87 of what pads: nothing beside the largest, 1
  }
  std::fill(row, row + from, 0.0f);
  std::fill(row + to, row + padded, 0.0f);
  return total(sum);
}

// The next queries of a sequence, which come behind `pos` tokens, with the kv
// head that they share: as products of `rows` with keys and values in panels.
template <typename T>
void attend_block(const float* q, Pages<T> keys, Pages<T> values,
                  const int32_t* table, int64_t head, int64_t heads,
                  int64_t count, int64_t pos, float scale, float softcap,
                  int64_t window, float* out) {
  const int64_t width = keys.width, group = heads / keys.heads;
  const int64_t begin = window ? std::max<int64_t>(0, pos + 1 - window) : 0;
  const int64_t tokens = pos + count - begin, all = count * group;
  const int64_t padded = (tokens + kPanel - 1) / kPanel * kPanel;
  const int64_t wide = (width + kPanel - 1) / kPanel * kPanel;
  static thread_local std::vector<float> query, panel, scores, held, result;
  query.resize(all * width);
  panel.assign(width * kPanel, 0);
  scores.resize(all * padded);
  held.assign(padded * wide, 0);
  result.resize(all * wide);
  for (int64_t r = 0; r < all; ++r)
    for (int64_t h = 0; h < width; ++h)
      query[r * width + h] = scale * q[
          (r / group * heads + head * group + r % group) * width + h];
  auto product = [all](const float* x, const float* w, float* y, int64_t inner,
                       int64_t stride) {
    for (int64_t r = 0; r < all; r += kRows)
      rows<float>(std::min<int64_t>(kRows, all - r), x + r * inner, w,
                  y + r * stride, inner, stride);
  };
  for (int64_t t = 0; t < padded; t += kPanel) {
    for (int64_t i = 0; i < std::min<int64_t>(kPanel, tokens - t); ++i) {
      const T* key = keys.at(head, table, begin + t + i);
      const T* value_of = values.at(head, table, begin + t + i);
      for (int64_t h = 0; h < width; ++h) {
        panel[h * kPanel + i] = value(key[h]);
        held[(h / kPanel * padded + t + i) * kPanel + h % kPanel] =
            value(value_of[h]);
      }
    }
    product(query.data(), panel.data(), scores.data() + t, width, padded);
  }
  if (softcap > 0)
    for (float& score : scores) score = softcap * std::tanh(score / softcap);
  std::vector<float> sums(all);
  for (int64_t r = 0; r < all; ++r) {
    const int64_t to = pos + r / group + 1;
    const int64_t from = window ? std::max<int64_t>(0, to - window) : 0;
    sums[r] = softmax(scores.data() + r * padded, from - begin, to - begin,
                      padded);
  }
  for (int64_t h = 0; h < wide; h += kPanel)
    product(scores.data(), held.data() + h * padded, result.data() + h, padded,
            wide);
  for (int64_t r = 0; r < all; ++r)
    for (int64_t h = 0; h < width; ++h)
      out[(r / group * heads + head * group + r % group) * width + h] =
          result[r * wide + h] / sums[r];
}

// The queries of one kv head of one row, over tokens first .. last - 1.
template <typename T>
void attend(const float* q, Pages<T> keys, Pages<T> values, const int32_t* table,
            int64_t head, int64_t group, int64_t first, int64_t last,
            float scale, float softcap, float* out) {
  const int64_t width = keys.width, whole = width - width % kLanes;
  const int64_t tokens = last - first;
  const int64_t padded = (tokens + kLanes - 1) / kLanes * kLanes;
  static thread_local std::vector<float> scores;
  scores.resize(group * padded);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t token = first + t;
    const T* key = keys.at(head, table, token);
    for (int64_t g = 0; g < group; ++g) {
      const float* query = q + g * width;
      Vec sum = {};
      for (int64_t h = 0; h < whole; h += kLanes)
        sum += load(query + h) * load(key + h);
      float score = total(sum);
      for (int64_t h = whole; h < width; ++h) score += query[h] * value(key[h]);
      score *= scale;
      if (softcap > 0) score = softcap * std::tanh(score / softcap);
      scores[g * padded + t] = score;
    }
  }
  std::memset(out, 0, group * width * sizeof(float));
  for (int64_t g = 0; g < group; ++g) {
    float* row = scores.data() + g * padded;
    const float factor = 1 / softmax(row, 0, tokens, padded);
    for (int64_t t = 0; t < tokens; ++t) row[t] *= factor;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t token = first + t;
    const T* held = values.at(head, table, token);
    for (int64_t g = 0; g < group; ++g) {
      const float weight = scores[g * padded + t];
      float* sum = out + g * width;
      for (int64_t h = 0; h < whole; h += kLanes)
        *reinterpret_cast<Vec*>(sum + h) += weight * load(held + h);
      for (int64_t h = whole; h < width; ++h) sum[h] += weight * value(held[h]);
    }
  }
}

struct Call {
  const float* q;
  const void *k, *v;
  ffi::Span<const int64_t> held;
  const int32_t *table, *start, *pos;
  int64_t rows, batch, heads, entries;
  float scale, softcap;
  int64_t window;
  float* out;
};

// Sequence b has rows start[b] .. start[b + 1] - 1, behind pos[b] tokens.
template <typename T>
void attend_all(ffi::ThreadPool& pool, const Call& call) {
  const int64_t kv_heads = call.held[0], width = call.held[3];
  const int64_t group = call.heads / kv_heads;
  auto pages = [&](const void* data) {
    return Pages<T>{static_cast<const T*>(data), kv_heads, call.held[1],
                    call.held[2], width};
  };
  const Pages<T> keys = pages(call.k), values = pages(call.v);
  const int64_t most = std::max<int64_t>(1, kBlock / group);
  struct Block { int64_t sequence, first, count; };
  std::vector<Block> blocks;
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t i = call.start[b]; i < call.start[b + 1]; i += most)
      blocks.push_back({b, i, std::min<int64_t>(most, call.start[b + 1] - i)});
  const int64_t tasks = blocks.size() * kv_heads, row = call.heads * width;
  std::fill(call.out + call.start[call.batch] * row, call.out + call.rows * row,
            0.0f);
  parallel(pool, tasks, [=, blocks = std::move(blocks)](int64_t task) {
    // The last ones see the most tokens, so they go first.
    const Block& block = blocks[blocks.size() - 1 - task / kv_heads];
    const int64_t head = task % kv_heads, b = block.sequence;
    const int64_t pos = call.pos[b] + block.first - call.start[b];
    const int32_t* table = call.table + b * call.entries;
    const int64_t at = block.first * row;
    if (block.count > 1)
      return attend_block(call.q + at, keys, values, table, head, call.heads,
                          block.count, pos, call.scale, call.softcap,
                          call.window, call.out + at);
    const int64_t from = at + head * group * width;
    attend(call.q + from, keys, values, table, head, group,
           call.window ? std::max<int64_t>(0, pos + 1 - call.window) : 0,
           pos + 1, call.scale, call.softcap, call.out + from);
  });
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q_SNH,
                  ffi::AnyBuffer k_KPCH, ffi::AnyBuffer v_KPCH,
                  ffi::Buffer<ffi::S32> table_BM, ffi::Buffer<ffi::S32> start_A,
                  ffi::Buffer<ffi::S32> pos_B,
                  ffi::ResultBuffer<ffi::F32> o_SNH, float scale,
                  float softcap, int64_t window) {
  auto run = k_KPCH.element_type() == ffi::F32 ? attend_all<float>
                                               : attend_all<uint16_t>;
  run(pool, {q_SNH.typed_data(), k_KPCH.untyped_data(), v_KPCH.untyped_data(),
             k_KPCH.dimensions(), table_BM.typed_data(), start_A.typed_data(),
             pos_B.typed_data(), q_SNH.dimensions()[0], pos_B.dimensions()[0],
             q_SNH.dimensions()[1], table_BM.dimensions()[1], scale, softcap,
             window, o_SNH->typed_data()});
  return ffi::Error::Success();
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
