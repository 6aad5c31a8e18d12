// walks.h: how the kernels go through a block: `reduce` sums over positions, `map` visits elements.
//
// Every verb is one of the two walks with a few lines of arithmetic, so the cut into tasks, the two
// layouts, the tails and the threads stand here and nowhere else.
//
// Layouts. inner == 1 is "rows": the channels lie side by side and a vector holds neighbouring
// channels. Everything else is "planes": a vector holds neighbouring positions of one channel.
//
// Cuts depend on the shape alone, and partial results are joined in the order of the cut: the same
// bits whatever the number of threads.
#pragma once
#include "simd.h"

namespace fusebn::FUSEBN_TARGET {

FUSEBN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEBN_INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
FUSEBN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch memory: a few numbers a channel, never an array of elements. Taken by the calling thread,
// so that an exhausted memory is an exception there and not the end of a worker.
template <class S>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : taken_(::operator new(sizeof(S) * count + 63)),
        data_(reinterpret_cast<S*>((reinterpret_cast<uintptr_t>(taken_) + 63) / 64 * 64)) {}
  ~Scratch() { ::operator delete(taken_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator S*() { return data_; }

 private:
  void* taken_;
  S* data_;  // at the beginning of a line of the cache: a vector that lies in two is two loads
};

// ---- reduce ----

// A task reads this many elements at least (512 KiB of float: some thirty microseconds; its runs then
// are long enough that joining them costs little) and there are at most kMaxTasks of them along the
// positions, which bounds the partial results a channel.
inline constexpr int64_t kTaskElements = 131072;
inline constexpr int64_t kMaxTasks = 32;
// Channels of one task: in rows, a contiguous 4 KiB of float; in planes, as many as fill 64 KiB.
inline constexpr int64_t kRowGroup = 1024;
inline constexpr int64_t kPlaneGroupElements = 16384;
inline constexpr int64_t kMaxPlaneGroup = 64;
// A run is summed in the lanes; 64 terms a lane keep the rounding error of float below 64 / 2^25 in
// the worst case and near 8 / 2^25 in practice. Runs are joined in double.
inline constexpr int64_t kRunTerms = 64;
// Of rows a task reads this many at least: what it does once and what the caller does for it, joining its
// sums to the others', are then a small part of it.
inline constexpr int64_t kLeastRows = 256;
// Of reduce_rows: a tile is so many rows by so many vectors, whose sums and constants fit into the
// registers; and how many rows ahead memory is asked for.
inline constexpr int64_t kBand = 8;
template <class T>
inline constexpr int kTileWidth = 4 * sizeof(T) / sizeof(Stat<T>);
inline constexpr int64_t kRowsAhead = 16;
// Of reduce_planes: how many elements ahead, and from how many on a plane has four sums a lane.
inline constexpr int64_t kPlaneAhead = 1024;
inline constexpr int64_t kLongPlane = 128;

// What there is one of for each channel (sums, constants) stands, beside rows, in the order of the lanes
// and in whole vectors, so many numbers; beside planes, in the order of the channels.
template <class T>
FUSEBN_INLINE int64_t in_lanes(Block b, int64_t channels) {
  return b.inner == 1 ? ceil_div(channels, Vec<T>::kLanes) * Vec<T>::kLanes : channels;
}
// From the order of the lanes to that of the channels, n of them.
template <class T, class N>
void to_channels(Block b, const N* lanes, int64_t n, N* channels) {
  constexpr int kLanes = Vec<T>::kLanes;
  int64_t c = 0;
  if (kStep<T> > 1 && b.inner == 1) {
    for (; c + kLanes <= n; c += kLanes)
#pragma GCC ivdep
      for (int i = 0; i < kLanes / 2; ++i) {
        channels[c + 2 * i] = lanes[c + i];
        channels[c + 2 * i + 1] = lanes[c + kLanes / 2 + i];
      }
    for (int i = 0; c < n; ++i, ++c) channels[c] = lanes[c - i + lane_of<T>(i)];
  } else {
    __builtin_memcpy(channels, lanes, n * sizeof(N));
  }
}
// From the order of the channels to that of the lanes, n of them, in place; n is of whole vectors.
template <class T>
void to_lanes(Block b, Stat<T>* values, int64_t n) {
  if (kStep<T> > 1 && b.inner == 1)
    for (int64_t c = 0; c < n; c += Vec<T>::kLanes)
      store_lanes(values + c, load_in_order<T>(values + c, Full{}));
}

// The positions of the longest run: kRunTerms for each sum that a channel has.
FUSEBN_INLINE int64_t longest_run(Block b) {
  if (b.inner == 1) return kRunTerms;
  return kRunTerms * 16 * (b.inner < kLongPlane ? 1 : 4);
}

// The cut of a block for `reduce`: chunks of positions times groups of channels.
struct Cut {
  int64_t chunk, chunks;  // positions in a chunk, number of chunks
  int64_t group, groups;  // channels in a group, number of groups

  explicit Cut(Block b) {
    if (b.inner == 1) {
      groups = ceil_div(b.channels, kRowGroup);
      group = ceil_div(ceil_div(b.channels, groups), 64) * 64;
    } else {
      group = most(1, least(least(kPlaneGroupElements / b.inner, kMaxPlaneGroup), b.channels));
    }
    groups = ceil_div(b.channels, group);
    const int64_t tasks = most(1, least(b.elements() / kTaskElements, kMaxTasks));
    const int64_t wanted = most(ceil_div(b.positions(), ceil_div(tasks, groups)),
                                b.inner == 1 ? kLeastRows : 1);
    // Whole bands of rows; whole runs, and whole planes where a run holds several of them.
    const int64_t run = longest_run(b);
    const int64_t unit = b.inner == 1 ? kBand : b.inner >= run ? run : (run / b.inner) * b.inner;
    chunk = ceil_div(wanted, unit) * unit;
    chunks = ceil_div(b.positions(), chunk);
  }
};

// The length of the run that starts at position p and has `left` positions left, `longest` at most: a
// part of a plane, or whole planes.
FUSEBN_INLINE int64_t run_length(Block b, int64_t p, int64_t left, int64_t longest) {
  const int64_t in_plane = p % b.inner, to_end = b.inner - in_plane;
  if (longest < to_end || in_plane) return least(least(longest, to_end), left);
  return least(longest / b.inner * b.inner, left);
}

// Whether `reduce` should read the rows of a block in two streams: see reduce_rows.
template <class T>
bool in_two_streams(Block b) {
  constexpr int64_t kLongRow = 1024;  // bytes; in shorter rows tile after tile is nearly one stream
  constexpr bool kWide = sizeof(T) == sizeof(Stat<T>);  // 16-bit elements: arithmetic is the limit
  return kWide && b.inner == 1 && b.channels * int64_t(sizeof(T)) >= kLongRow &&
         b.elements() * int64_t(sizeof(T)) >= streaming_bytes();
}

// A kernel for `reduce` sums two terms a channel. It offers
//   prefetch(e)                 element e will be read soon
//   begin(p, n)                 a run of n positions starts at p
//   Constants constants(c), Constants constant(c)
//                               what the terms need of the channels c.. side by side (rows, c = c0 + a
//                               multiple of the lanes), or of c alone (planes)
//   terms<rows>(e, p, k, lanes, u, v)
//                               adds the terms of the elements e.. at the position p (rows), or at
//                               the positions p.. (planes), to u and v; dead lanes are ignored
//   join(n, u, v)               the run's sums of the task's channels, n of them, padded (in_lanes)
//   two_streams                 see in_two_streams
//
// A band of rows is read tile by tile, so that the sums stay in registers for a while. The hardware
// does not foresee that order (a tile is some 256 bytes of every row, and rows are often a power of two
// apart), so each vector asks for the one kRowsAhead below it, into L2: in L1 those rows would collide.
//
// Where the rows are long and memory is the limit, that order takes a third longer than reading in
// few streams. There a band is two rows and a tile one vector, and the sums wait in L1. Either way a
// lane adds the same terms in the same order.
template <class T, class K>
void reduce_rows(K& kernel, Block b, int64_t p, int64_t n, int64_t c0, int64_t c1) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  // 512 lanes between them: a load that agrees in its last 12 bits with a store just before waits for
  // it, and v[c] would be stored before u[c + kLanes] is loaded.
  alignas(64) Stat<T> sums[2 * (kRowGroup + kLanes) + 512];
  Stat<T>*const u = sums, *const v = sums + kRowGroup + kLanes + 512;
  const int64_t padded = in_lanes<T>(b, c1 - c0);
  for (int64_t c = 0; c < padded; ++c) u[c] = v[c] = 0;
  int64_t r = p;
  const K local = kernel;  // see map_rows
  const auto tile = [&]<int rows, int width>(int64_t c, auto lanes) {
    V sum_u[width], sum_v[width];
    typename K::Constants k[width];
    for (int j = 0; j < width; ++j) {
      const int64_t at = c + j * kLanes;
      sum_u[j] = load_lanes<T>(u + at - c0);
      sum_v[j] = load_lanes<T>(v + at - c0);
      k[j] = local.constants(at);
    }
    // Not unrolled: the hardware tells streams apart by their load instructions, and narrow rows take a
    // fifth longer with one for each row.
#pragma GCC unroll 1
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < width; ++j) {
        const int64_t e = (r + i) * b.channels + c + j * kLanes;
        local.prefetch(e + kRowsAhead * b.channels);
        local.template terms<true>(e, r + i, k[j], lanes, sum_u[j], sum_v[j]);
      }
    for (int j = 0; j < width; ++j) {
      store_lanes(u + c + j * kLanes - c0, sum_u[j]);
      store_lanes(v + c + j * kLanes - c0, sum_v[j]);
    }
  };
  const auto band = [&]<int rows, int width>() {
    int64_t c = c0;
    for (; c + width * kLanes <= c1; c += width * kLanes)
      tile.template operator()<rows, width>(c, Full{});
    for (; c + kLanes <= c1; c += kLanes) tile.template operator()<rows, 1>(c, Full{});
    if (c < c1) tile.template operator()<rows, 1>(c, Part{c1 - c});
    r += rows;
  };
  if (kernel.two_streams)
    while (r + 2 <= p + n) band.template operator()<2, 1>();
  while (r + kBand <= p + n) band.template operator()<kBand, kTileWidth<T>>();
  while (r < p + n) band.template operator()<1, kTileWidth<T>>();
  kernel.join(padded, u, v);
}

// A run lies inside one plane of each channel, or is made of whole planes. Memory order: for every
// outer index the planes of the group are neighbours, so their sums wait side by side in L1.
template <class T, class K>
void reduce_planes(K& kernel, Block b, int64_t p, int64_t n, int64_t c0, int64_t c1) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  V u[kMaxPlaneGroup], v[kMaxPlaneGroup];
  for (int64_t c = c0; c < c1; ++c) u[c - c0] = v[c - c0] = splat<T>(0);
  for (int64_t at = p; at < p + n;) {
    const int64_t i0 = at % b.inner, length = least(b.inner - i0, p + n - at);
    for (int64_t c = c0; c < c1; ++c) {
      const auto k = kernel.constant(c);
      const int64_t e = (at / b.inner * b.channels + c) * b.inner + i0;
      V su = u[c - c0], sv = v[c - c0];
      int64_t i = 0;
      if (length >= kLongPlane) {
        // Four sums, since one would wait for its own last addition.
        V fu[4], fv[4];
        for (int j = 0; j < 4; ++j) fu[j] = fv[j] = splat<T>(0);
        for (; i + 4 * kLanes <= length; i += 4 * kLanes)
          for (int j = 0; j < 4; ++j) {
            const int64_t ij = i + j * kLanes;
            kernel.prefetch(e + ij + kPlaneAhead);
            kernel.template terms<false>(e + ij, at + ij, k, Full{}, fu[j], fv[j]);
          }
        su = su + ((fu[0] + fu[1]) + (fu[2] + fu[3]));
        sv = sv + ((fv[0] + fv[1]) + (fv[2] + fv[3]));
      }
      for (; i + kLanes <= length; i += kLanes) {
        kernel.prefetch(e + i + b.channels * b.inner);  // short planes: the next outer index
        kernel.template terms<false>(e + i, at + i, k, Full{}, su, sv);
      }
      if (i < length) kernel.template terms<false>(e + i, at + i, k, Part{length - i}, su, sv);
      u[c - c0] = su;
      v[c - c0] = sv;
    }
    at += length;
  }
  Stat<T> sum_u[kMaxPlaneGroup], sum_v[kMaxPlaneGroup];
  for (int64_t c = 0; c < c1 - c0; ++c) sum_u[c] = sum(u[c]), sum_v[c] = sum(v[c]);
  kernel.join(c1 - c0, sum_u, sum_v);
}

// Sums over the positions [p0, p1) for the channels [c0, c1).
template <class T, class K>
void reduce(K& kernel, Block b, int64_t p0, int64_t p1, int64_t c0, int64_t c1) {
  for (int64_t p = p0, n; p < p1; p += n) {
    n = run_length(b, p, p1 - p, longest_run(b));
    kernel.begin(p, n);
    if (b.inner == 1)
      reduce_rows<T>(kernel, b, p, n, c0, c1);
    else
      reduce_planes<T>(kernel, b, p, n, c0, c1);
  }
}

// Few channels side by side would leave most lanes idle. The same memory is also `fold` times as
// many channels in that many times fewer rows, with the lanes full; what does not divide is a
// block of its own. The caller joins the copies of a channel afterwards.
template <class T>
struct Folded {
  int64_t fold;
  Block main, rest;
  int64_t rest_at;  // element where `rest` begins

  explicit Folded(Block b) : fold(1), main(b), rest{0, b.channels, 1}, rest_at(b.elements()) {
    constexpr int kLanes = Vec<T>::kLanes;
    if (b.inner != 1 || b.channels >= kTileWidth<T> * kLanes) return;
    while (fold * b.channels % kLanes) fold *= 2;
    if (fold == 1 || b.outer < fold) {
      fold = 1;
      return;
    }
    main = {b.outer / fold, b.channels * fold, 1};
    rest.outer = b.outer % fold;
    rest_at = main.elements();
  }
};

// ---- map ----

// Elements of one task. Small enough to be shared out evenly, large enough (256 KiB of float) that
// claiming it costs nothing.
inline constexpr int64_t kMapElements = 65536;
inline constexpr int64_t kMapAhead = 2048;  // elements; half of it is too few, twice it gains nothing

// In rows the constants are laid out again and again until a pattern is this long: most vectors then
// need not ask whether it has come to its end.
inline constexpr int64_t kPattern = 512;

// The constants of N kinds a channel that `map` hands to its kernel. In rows they are a periodic
// pattern, one vector longer than the period, so that a vector may begin at any channel. Where
// neighbouring lanes are every other element, so are neighbours in a table: there are two of them.
template <class T, int N>
class ChannelConstants {
 public:
  using S = Stat<T>;

  explicit ChannelConstants(Block b)
      : channels_(b.channels),
        split_(kStep<T> > 1 && b.inner == 1),
        period_(channels_),
        stride_(ceil_div(channels_, 16) * 16),
        data_(room(b)) {}

  void set(int64_t c, const S (&values)[N]) {
    for (int i = 0; i < N; ++i) in_order(i)[c] = quiet(values[i]);
  }
  // Once all are set: repeats them, twice as many at a time, to the end of the pattern.
  void seal() {
    for (int i = 0; i < N; ++i) {
      S* const pattern = in_order(i);
      for (int64_t done = channels_, n; done < stride_; done += n) {
        n = least(done, stride_ - done);
        __builtin_memcpy(pattern + done, pattern, n * sizeof(S));
      }
      if (!split_) continue;
      S *const even = of(i, 0), *const odd = of(i, 1);  // where the pattern before was
#pragma GCC ivdep
      for (int64_t j = 0; j < stride_ / 2; ++j) {
        even[j] = pattern[2 * j];
        odd[j] = pattern[2 * j + 1];
      }
    }
  }

  int64_t period() const { return period_; }
  // The table of a kind; where there are two, that of the even channels or of the odd ones.
  S* of(int kind, int64_t odd = 0) const { return data_ + kind * stride_ + odd * (stride_ / 2); }

 private:
  S* in_order(int kind) const { return of(kind + split_); }
  int64_t room(Block b) {
    if (b.inner == 1) {
      const int64_t even = channels_ % kStep<T> ? channels_ * kStep<T> : channels_;
      period_ = even * least(ceil_div(kPattern, even), ceil_div(b.elements(), even));
      stride_ = ceil_div(period_ + Vec<T>::kLanes + 1, 32) * 32;
    }
    return (N + split_) * stride_;
  }

  int64_t channels_;
  bool split_;
  int64_t period_, stride_;
  mutable Scratch<S> data_;
};

// Elements until out + e may be streamed to, at most `end - e`.
template <class T>
int64_t until_aligned(const T* out, int64_t e, int64_t end) {
  const int64_t beyond = int64_t(reinterpret_cast<uintptr_t>(out + e) % 64);
  return beyond ? least((64 - beyond) / int64_t(sizeof(T)), end - e) : 0;
}

// A kernel for `map` writes `out` and is called as kernel.visit<rows>(e, p, k, lanes): the elements
// e.., the position p they share (rows, when it reads weights) or start at (planes), and the
// constants. Vectors are aligned on `out`, so that the kernel may stream the Full ones. Where it does,
// its inputs come from memory, too, and kernel.prefetch(e) asks for them early: the hardware alone
// does not look far enough ahead when the table of constants and the streams compete for L1.
//
// Kernels and tables of constants are copied to where no other name can reach them: the compiler has
// to expect that a store to `out` changes anything else, and would read them again for every vector.
template <class T, int N, class K>
void map_rows(const K kernel, Block b, const ChannelConstants<T, N>& constants, int64_t e,
              int64_t end, int64_t p) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  const Stat<T>*first[N], *second[N];  // where the lanes of a vector's first and second half lie
  const auto begin_at = [&](int64_t at) __attribute__((always_inline)) {
    for (int i = 0; i < N; ++i)
      if constexpr (kStep<T> == 1) {
        first[i] = constants.of(i);
        second[i] = first[i] + V::kParts / 2 * V::kPartLanes;
      } else {
        first[i] = constants.of(i, at % 2);
        second[i] = constants.of(i, 1 - at % 2) + at % 2;
      }
  };
  const auto visit = [&](int64_t at, auto lanes) __attribute__((always_inline)) {
    V k[N];
    const uint64_t lane = uint64_t(at) / kStep<T>;
    for (int i = 0; i < N; ++i) k[i] = load_lanes<T>(first[i] + lane, second[i] + lane);
    kernel.template visit<true>(e, p, k, lanes);
  };
  const int64_t period = constants.period();
  int64_t at = e % b.channels;
  begin_at(at);
  if (const int64_t head = until_aligned(kernel.out, e, end)) {
    visit(at, Part{head});
    e += head;
    at = (at + head) % period;
    begin_at(at);
  }
  while (e + kLanes <= end) {
    int64_t vectors = least((end - e) / kLanes, ceil_div(period - at, kLanes));
    for (; vectors > 0; --vectors, e += kLanes, at += kLanes) {
      if (kernel.streaming) kernel.prefetch(e + kMapAhead);
      visit(at, Full{});
    }
    if (at >= period) at -= period;
  }
  if (e < end) visit(at, Part{end - e});
}

// Goes through planes as if there were none, so that short ones have no heads and tails of their own: a
// vector that begins in one plane and ends in another takes its constants from both. (The position p is
// that of the first plane: where the kernel reads it, `map` hands over one plane at a time.)
template <class T, int N, class K>
void map_planes(const K kernel, Block b, const ChannelConstants<T, N>& constants, int64_t e,
                int64_t end, int64_t p) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  const Stat<T>* table[N];
  for (int i = 0; i < N; ++i) table[i] = constants.of(i);
  int64_t c = e / b.inner % b.channels, left = b.inner - e % b.inner;  // of the plane
  V k[N];
  for (int i = 0; i < N; ++i) k[i] = splat<T>(table[i][c]);
  const auto visit = [&](int64_t n, auto lanes) __attribute__((always_inline)) {
    V spliced[N];
    for (int i = 0; i < N; ++i) spliced[i] = k[i];
    for (; left < n; left += b.inner) {
      c = c + 1 < b.channels ? c + 1 : 0;
      for (int i = 0; i < N; ++i) {
        k[i] = splat<T>(table[i][c]);
        spliced[i] = splice(spliced[i], left, k[i]);
      }
    }
    kernel.template visit<false>(e, p, spliced, lanes);
    left -= n;
    e += n;
    p += n;
  };
  if (const int64_t head = until_aligned(kernel.out, e, end)) visit(head, Part{head});
  while (e + kLanes <= end) {
    const int64_t inside = least(left, end - e) / kLanes;
    for (int64_t i = 0; i < inside; ++i, e += kLanes, p += kLanes) {
      if (kernel.streaming) kernel.prefetch(e + kMapAhead);
      kernel.template visit<false>(e, p, k, Full{});
    }
    left -= inside * kLanes;
    if (e + kLanes > end) break;
    if (kernel.streaming) kernel.prefetch(e + kMapAhead);
    visit(kLanes, Full{});
  }
  if (e < end) visit(end - e, Part{end - e});
}

template <class T, class L>
FUSEBN_INLINE void write(T* p, Vec<T> v, L lanes, bool streaming) {
  if constexpr (std::is_same_v<L, Full>)
    if (streaming) return stream(p, v);
  store(p, v, lanes);
}

// Visits every element once. `located`: the kernel needs to know its position (it reads weights), and
// is called row by row or plane by plane.
//
// The walk goes from the end to the beginning: it follows a reduction that went the other way, and
// what that one read last is still in the cache.
template <class T, int N, class K>
void map(const K& kernel, Block b, const ChannelConstants<T, N>& constants, bool located,
         Executor& executor) {
  const int64_t total = b.elements(), tasks = ceil_div(total, kMapElements);
  const int64_t line = b.inner == 1 ? b.channels : b.inner;
  const auto task = [&](int64_t index) {
    int64_t e = (tasks - 1 - index) * kMapElements;
    const int64_t end = least(e + kMapElements, total);
    while (e < end) {
      const int64_t at = e / line;  // the row or plane
      const int64_t stop = located ? least((at + 1) * line, end) : end;
      if (b.inner == 1)
        map_rows<T, N>(kernel, b, constants, e, stop, at);
      else
        map_planes<T, N>(kernel, b, constants, e, stop, at / b.channels * b.inner + e % b.inner);
      e = stop;
    }
    if (kernel.streaming) fence();
  };
  executor.run(tasks, Task::of(task));
}

}  // namespace fusebn::FUSEBN_TARGET
