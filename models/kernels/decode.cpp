// A pass of few rows through all layers in one call: norm, projections, rotation, attention, MLP, logits. Each request brings a new token,
// or a part of its prompt.
//
// Between two products every thread must know all of the first one's outputs, five times a layer. Each product is cut into chunks of
// some microseconds, which threads take from their own share first and then from others'. Nothing waits for a thread that the system
// has taken off its core: whoever finds nothing left to take, and a chunk unfinished for longer than chunks last, computes it once
// more. That does no harm, because a chunk writes what depends on earlier chunks alone, to a place of its own: buffers are by layer, and
// a late thread writes the same values again. The caller's thread alone could compute everything, so others may come late or never.
//
// Threads sleep between steps, in a futex.

#include "decode.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <unistd.h>
#include <vector>

namespace decode {

namespace {

constexpr int64_t CHUNK_BYTES = 64 << 10;  // of weights: about five microseconds
constexpr int64_t CHUNKS_PER_THREAD = 4;   // at least, of small matrices
constexpr int64_t CHUNK_MULTIPLE = 24;     // outputs: kernels compute three, four or eight at a time
constexpr int64_t CHUNK_MULTIPLE_INT8 = 32;
constexpr int64_t LINE = 64;               // bytes that two cores must not write side by side
constexpr double PATIENCE = 2;             // times that chunks of this product took, before an unfinished one is computed once more
constexpr auto LEAST_PATIENCE = std::chrono::microseconds(10);

using Clock = std::chrono::steady_clock;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

enum class Kind { QKV, ATTEND, OUT, GATE_UP, DOWN, HEAD };

// What a task attends for in one KV head: some queries of a request's new rows.
struct Queries {
  int64_t request, row;  // the first new row, among those of the stage
  int64_t first, count;
};

// A layer, or the head, on the rows that run it.
struct Stage {
  const Layer* layer;
  int64_t index;                     // of the layer
  std::vector<const float*> before;  // its rows [width]
  std::vector<Queries> queries;      // the tasks of each KV head
  float *qkv, *middle, *after;       // [rows, qkv outputs], [rows, width] twice
  char *mixed, *gated;               // inputs of `out` and of `down`

  int64_t rows() const { return before.size(); }
};

struct alignas(LINE) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// What must be finished before the next phase begins.
struct Phase {
  Kind kind;
  const Stage* stage;
  int64_t number;        // no other phase of any call has it
  int64_t chunks, step;  // a chunk computes `step` outputs
  std::unique_ptr<Share[]> shares;
  std::unique_ptr<std::atomic<bool>[]> finished;
  alignas(LINE) std::atomic<int64_t> count;  // of finished chunks

  bool done() const { return count.load(std::memory_order_acquire) == chunks; }

  void finish(int64_t chunk) {
    if (!finished[chunk].exchange(true, std::memory_order_acq_rel)) count.fetch_add(1, std::memory_order_acq_rel);
  }

  // A chunk that nobody has taken, or -1: of thread `self`'s own share first, so that it reads on where it was.
  int64_t take(int self, int threads) {
    for (int i = 0; i < threads; ++i) {
      Share& share = shares[(self + i) % threads];
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
      const int64_t chunk = share.next.fetch_add(1, std::memory_order_relaxed);
      if (chunk < share.end) return chunk;
    }
    return -1;
  }
};

// What a thread keeps for itself.
struct Own {
  const Phase* normed_for = nullptr;
  std::vector<char> inputs;    // [rows, width], normed
  std::vector<float> outputs;  // of a chunk
};

// One call.
class Step {
 public:
  Step(const Model& model, const Kernels& kernels, const Request* requests, int64_t count, float* logits, int threads)
      : model(model), kernels(kernels), requests(requests), logits(logits), count(count), threads(threads) {
    lay_out();
  }

  void work(int self) {
    Own own;
    for (int64_t i = 0; i < phase_count; ++i) {
      Phase& phase = phases[i];
      if (phase.done()) continue;
      const auto start = Clock::now();
      int64_t ran = 0;
      for (int64_t chunk; (chunk = phase.take(self, threads)) >= 0; ++ran) {
        run(phase, chunk, own);
        phase.finish(chunk);
      }
      if (!phase.done()) wait(phase, own, start, ran);
    }
  }

 private:
  const Model& model;
  const Kernels& kernels;
  const Request* requests;
  float* logits;
  int64_t count;  // of requests
  int threads;
  std::vector<int64_t> starts;  // each request's first row among all rows
  std::vector<Stage> stages;
  std::unique_ptr<Phase[]> phases;
  int64_t phase_count = 0;
  std::vector<float> hidden;    // [rows, width]
  std::vector<float> cos, sin;  // [rows, head_dim / 2]
  std::unique_ptr<char[]> buffers;

  // Until a phase is done. Chunks that take too long are computed here too.
  void wait(Phase& phase, Own& own, Clock::time_point start, int64_t ran) {
    const auto now = Clock::now();
    const auto each = ran ? (now - start) / ran : Clock::duration::zero();
    const auto until = now + std::max<Clock::duration>(LEAST_PATIENCE, std::chrono::duration_cast<Clock::duration>(PATIENCE * each));
    for (int spin = 1; !phase.done(); ++spin) {
      pause();
      if (spin % 16 || Clock::now() < until) continue;
      for (int64_t chunk = 0; chunk < phase.chunks && !phase.done(); ++chunk)
        if (!phase.finished[chunk].load(std::memory_order_acquire)) {
          run(phase, chunk, own);
          phase.finish(chunk);
        }
    }
  }

  void lay_out() {
    std::vector<const float*> current = read_rows();
    stages.reserve(model.num_layers + 1);
    int64_t bytes = 0;
    const auto place = [&](int64_t wanted) { return std::exchange(bytes, bytes + (wanted + LINE - 1) / LINE * LINE); };
    std::vector<int64_t> offsets;
    for (int64_t index = 0; index < model.num_layers; ++index) {
      const Layer& layer = model.layers[index];
      Stage stage{&layer, index, {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr};
      int64_t n = 0;
      for (int64_t r = 0; r < count; ++r)
        if (requests[r].slabs[index]) add_queries(stage, r, std::exchange(n, n + requests[r].rows));
      if (!n) continue;
      const int64_t wide = n * model.width * sizeof(float);
      for (const int64_t part : {n * layer.qkv.outputs * int64_t(sizeof(float)), wide, wide, n * layer.out.inputs * kernels.input_bytes,
                                 n * layer.down.inputs * kernels.input_bytes})
        offsets.push_back(place(part));
      stages.push_back(std::move(stage));
    }
    buffers.reset(new char[bytes + LINE]);
    phases.reset(new Phase[5 * stages.size() + 1]);
    const int64_t* offset = offsets.data();
    for (Stage& stage : stages) {
      const auto next = [&] { return buffers.get() + *offset++; };
      stage.qkv = reinterpret_cast<float*>(next());
      stage.middle = reinterpret_cast<float*>(next());
      stage.after = reinterpret_cast<float*>(next());
      stage.mixed = next(), stage.gated = next();
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = starts[r]; requests[r].slabs[stage.index] && i < starts[r + 1]; ++i)
          stage.before.push_back(std::exchange(current[i], stage.after + stage.rows() * model.width));
      const Layer& layer = *stage.layer;
      add_product(Kind::QKV, stage, layer.qkv, layer.qkv.outputs);
      add(Kind::ATTEND, stage, stage.queries.size() * layer.kv_heads, 1);
      add_product(Kind::OUT, stage, layer.out, layer.out.outputs);
      add_product(Kind::GATE_UP, stage, layer.gate_up, layer.down.inputs);
      add_product(Kind::DOWN, stage, layer.down, layer.down.outputs);
    }
    Stage last{nullptr, model.num_layers, {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr};
    for (int64_t r = 0; r < count; ++r)
      last.before.insert(last.before.end(), current.begin() + starts[r + 1] - requests[r].logits, current.begin() + starts[r + 1]);
    if (!last.rows()) return;
    stages.push_back(std::move(last));
    add_product(Kind::HEAD, stages.back(), model.head, model.head.outputs);
  }

  // All rows in float32, and the angles of their positions; returns where each row lies.
  std::vector<const float*> read_rows() {
    const int64_t half = model.head_dim / 2, row_bytes = model.width * (model.bf16 ? 2 : 4);
    starts.push_back(0);
    for (int64_t r = 0; r < count; ++r) starts.push_back(starts[r] + requests[r].rows);
    hidden.resize(starts[count] * model.width);
    cos.resize(starts[count] * half), sin.resize(starts[count] * half);
    std::vector<const float*> found;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < requests[r].rows; ++i) {
        const int64_t at = starts[r] + i;
        float* const row = hidden.data() + at * model.width;
        kernels.widen(static_cast<const char*>(requests[r].hidden) + i * row_bytes, model.width, row);
        found.push_back(row);
        for (int64_t j = 0; j < half; ++j) {
          const float angle = float(requests[r].positions[i]) * model.inv_freq[j];
          cos[at * half + j] = kernels.rounded(std::cos(angle) * model.rope_scaling);
          sin[at * half + j] = kernels.rounded(std::sin(angle) * model.rope_scaling);
        }
      }
    return found;
  }

  // Each task appends the new keys that it reads, so that none waits for another: they write the same values.
  void add_queries(Stage& stage, int64_t request, int64_t row) {
    const int64_t all = requests[request].rows * (stage.layer->heads / stage.layer->kv_heads);
    const int64_t at_once = requests[request].rows > 1 ? kernels.queries_at_once : all;
    for (int64_t first = 0; first < all; first += at_once)
      stage.queries.push_back({request, row, first, std::min(at_once, all - first)});
  }

  void add_product(Kind kind, const Stage& stage, const Matrix& matrix, int64_t outputs) {
    const bool few_bits = matrix.format == INT8;
    const int64_t multiple = few_bits ? CHUNK_MULTIPLE_INT8 : CHUNK_MULTIPLE;
    const int64_t row_bytes = matrix.inputs * (few_bits ? 1 : model.bf16 ? 2 : 4) * matrix.outputs / outputs;
    const int64_t most = std::min(CHUNK_BYTES / row_bytes, outputs / (CHUNKS_PER_THREAD * threads));
    const int64_t step = multiple * std::max<int64_t>(1, most / multiple);
    add(kind, stage, (outputs + step - 1) / step, step);
  }

  void add(Kind kind, const Stage& stage, int64_t chunks, int64_t step) {
    Phase& phase = phases[phase_count++];
    static int64_t last_number = 0;  // one call at a time
    phase.kind = kind, phase.stage = &stage, phase.number = ++last_number, phase.chunks = chunks, phase.step = step;
    phase.shares.reset(new Share[threads]);
    phase.finished.reset(new std::atomic<bool>[chunks] {});
    phase.count = 0;
    for (int i = 0; i < threads; ++i) {
      phase.shares[i].next = chunks * i / threads;
      phase.shares[i].end = chunks * (i + 1) / threads;
    }
  }

  void run(const Phase& phase, int64_t chunk, Own& own) {
    const Stage& stage = *phase.stage;
    const int64_t first = chunk * phase.step;
    switch (phase.kind) {
      case Kind::QKV: {
        const Matrix& m = stage.layer->qkv;
        product(m, normed(phase, stage.layer->input_norm, own), phase, first, stage.qkv + first, m.outputs);
        return;
      }
      case Kind::ATTEND: return attend(stage, chunk);
      case Kind::OUT: return add_to_rows(stage.layer->out, stage.mixed, phase, first, own, stage.middle);
      case Kind::GATE_UP: return gate(phase, first, own);
      case Kind::DOWN: return add_to_rows(stage.layer->down, stage.gated, phase, first, own, stage.after);
      case Kind::HEAD:
        product(model.head, normed(phase, model.norm, own), phase, first, logits + first, model.head.outputs);
    }
  }

  static int64_t end(int64_t first, int64_t step, int64_t outputs) { return std::min(first + step, outputs); }

  void product(const Matrix& m, const void* inputs, const Phase& phase, int64_t first, float* y, int64_t stride) {
    kernels.product(m, {inputs, phase.number}, phase.stage->rows(), first, end(first, phase.step, m.outputs), y, stride);
  }

  // The rows before the layer or, for its MLP, in its middle: normed, once for each thread and phase.
  const void* normed(const Phase& phase, const void* weight, Own& own) {
    if (own.normed_for == &phase) return own.inputs.data();
    const Stage& stage = *phase.stage;
    const int64_t n = stage.rows(), row_bytes = model.width * kernels.input_bytes;
    own.inputs.resize(n * row_bytes);
    for (int64_t i = 0; i < n; ++i) {
      const float* const row = phase.kind == Kind::GATE_UP ? stage.middle + i * model.width : stage.before[i];
      kernels.norm(row, weight, model.width, model.eps, own.inputs.data() + i * row_bytes);
    }
    own.normed_for = &phase;
    return own.inputs.data();
  }

  void attend(const Stage& stage, int64_t task) {
    const Layer& layer = *stage.layer;
    const int64_t tasks = stage.queries.size(), h = task / tasks, dim = model.head_dim;
    const Queries& some = stage.queries[task % tasks];
    const int64_t group = layer.heads / layer.kv_heads, element = model.bf16 ? 2 : 4, angles = starts[some.request] * dim / 2;
    const Request& request = requests[some.request];
    const float* const row = stage.qkv + some.row * layer.qkv.outputs;
    const int64_t head_bytes = request.capacity[stage.index] * dim * element;
    char* const keys = static_cast<char*>(request.slabs[stage.index]) + h * head_bytes;
    const Head head{row + h * group * dim, row + (layer.heads + h) * dim, row + (layer.heads + layer.kv_heads + h) * dim,
                    layer.qkv.outputs, cos.data() + angles, sin.data() + angles, keys, keys + layer.kv_heads * head_bytes,
                    request.bias, request.lengths[stage.index], group, dim, some.first, some.count};
    char* const mixed = stage.mixed + (some.row * layer.heads + h * group) * dim * kernels.input_bytes;
    (request.rows > 1 ? kernels.attend_many : kernels.attend)(head, mixed, layer.heads * dim);
  }

  // Products of `out` and `down`, added to the rows that they change.
  void add_to_rows(const Matrix& m, const char* inputs, const Phase& phase, int64_t first, Own& own, float* to) {
    const Stage& stage = *phase.stage;
    const int64_t count = end(first, phase.step, m.outputs) - first, n = stage.rows();
    own.outputs.resize(n * count);
    product(m, inputs, phase, first, own.outputs.data(), count);
    for (int64_t i = 0; i < n; ++i) {
      const float* const from = (to == stage.middle ? stage.before[i] : stage.middle + i * model.width) + first;
      for (int64_t o = 0; o < count; ++o) to[i * model.width + first + o] = from[o] + own.outputs[i * count + o];
    }
  }

  void gate(const Phase& phase, int64_t first, Own& own) {
    const Stage& stage = *phase.stage;
    const Matrix& m = stage.layer->gate_up;
    const int64_t n = stage.rows(), width = m.outputs / 2, last = end(first, phase.step, width), count = last - first;
    const Inputs inputs{normed(phase, stage.layer->post_norm, own), phase.number};
    own.outputs.resize(2 * n * count);
    kernels.product(m, inputs, n, first, last, own.outputs.data(), 2 * count);
    kernels.product(m, inputs, n, width + first, width + last, own.outputs.data() + count, 2 * count);
    for (int64_t i = 0; i < n; ++i) {
      const float* const both = own.outputs.data() + 2 * i * count;
      kernels.swiglu(both, both + count, count, stage.gated + (i * width + first) * kernels.input_bytes);
    }
  }
};

// The threads beside the caller's. They live as long as the process.
class Pool {
 public:
  void run(Step& step, int threads) {
    while (int(workers.size()) < threads - 1) {
      workers.push_back(std::make_unique<Worker>());
      std::thread(&Pool::serve, this, std::ref(*workers.back()), int(workers.size())).detach();
    }
    current = &step, wanted = threads;
    const uint32_t call = ++last_call;
    open.store(call);
    if (threads > 1) calls.store(call), calls.notify_all();
    step.work(0);
    open.store(0);
    for (const auto& worker : workers)  // one that was taken off its core inside of a chunk, which is finished
      for (int spin = 0; worker->inside.load() == call; ++spin) spin < 1000 ? pause() : std::this_thread::yield();
  }

 private:
  struct alignas(LINE) Worker {
    std::atomic<uint32_t> inside{0};
  };

  std::vector<std::unique_ptr<Worker>> workers;
  Step* current = nullptr;
  int wanted = 0;
  uint32_t last_call = 0;
  std::atomic<uint32_t> calls{0}, open{0};

  void serve(Worker& own, int self) {
    for (uint32_t seen = 0;;) {
      calls.wait(seen);
      seen = calls.load();
      own.inside.store(seen);
      if (open.load() == seen && self < wanted) current->work(self);
      own.inside.store(0);
    }
  }
};

// A forked process has none of its parent's threads.
Pool& pool() {
  static Pool* found = nullptr;
  static pid_t owner = 0;
  if (owner != getpid()) found = new Pool, owner = getpid();
  return *found;
}

}  // namespace
}  // namespace decode

extern "C" {

// Whether this processor runs the portable kernels.
int portable_supported() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

// The new rows of `count` requests through all layers that they run, to the logits [rows, vocabulary] that are wanted. Keys and values
// are appended; the caller counts them, and has seen to it that there is room.
void run_few_rows(const decode::Model* model, const decode::Request* requests, int64_t count, float* logits, int threads) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const decode::Kernels* const kernels = model->avx512 ? decode::avx512_kernels(model->bf16) : decode::portable_kernels(model->bf16);
  decode::Step step(*model, *kernels, requests, count, logits, threads);
  decode::pool().run(step, threads);
}
}
