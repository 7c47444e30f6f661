// Rows grouped by class: a stable sort of their labels in memory O(N), whatever the number of classes.
//
// For the host side of an operator, whose kernels then take order and segments as raw pointers. Labels are int32 or
// int64, n is below 2^31. A label below 0 or equal to ignore_index leaves its row out. First count_labels, which finds
// a label that is too large; then group_by_class.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace dlkernels {

// order[begin, end) are the rows of one class.
struct Segment {
  int64_t label, begin, end;
};

struct Segments {
  std::vector<int32_t> order;     // the rows that count, by class; within a class in their own order
  std::vector<Segment> segments;  // the classes present, ascending
};

struct LabelCount {
  int64_t counted;  // labels that are neither negative nor ignore_index
  int64_t bad;      // the first row whose label is num_classes or more, or -1
};

// Written so that the loop vectorises.
template <class I>
LabelCount count_labels(const I* labels, int64_t n, int64_t num_classes, int64_t ignore_index) {
  const I ignored = static_cast<I>(ignore_index);
  const bool some_ignored = static_cast<int64_t>(ignored) == ignore_index;
  const I last = static_cast<I>(std::min<int64_t>(num_classes, sizeof(I) == 4 ? INT32_MAX : INT64_MAX));
  int64_t counted = 0;
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = std::min(n, begin + 4096);
    I good = 0, bad = 0;
    for (int64_t i = begin; i < end; ++i) {
      const I y = labels[i], counts = (y >= 0) & ((y != ignored) | I{!some_ignored});
      good += counts;
      bad |= counts & (y >= last);
    }
    counted += good;
    if (!bad) continue;
    for (int64_t i = begin; i < end; ++i)
      if (labels[i] >= last && labels[i] != ignore_index) return {counted, i};
  }
  return {counted, -1};
}

// num_classes up to 2^31; every label that counts is below it. Up to 2048 classes one counting sort, else a radix sort
// from the least significant digit on, of at most 11 bits: two passes up to four million classes, each O(n + 2048).
template <class I>
Segments group_by_class(const I* labels, int64_t n, int64_t num_classes, int64_t ignore_index) {
  const auto counts = [&](I y) { return y >= 0 && y != ignore_index; };
  int bits = 1;
  while (bits < 32 && (int64_t{1} << bits) < num_classes) ++bits;
  const int passes = (bits + 10) / 11, digit = (bits + passes - 1) / passes;
  const uint32_t mask = (uint32_t{1} << digit) - 1;
  std::vector<int32_t> start(mask + 2);
  Segments result;

  if (passes == 1) {
    for (int64_t i = 0; i < n; ++i)
      if (counts(labels[i])) ++start[labels[i] + 1];
    for (int64_t k = 0; k <= mask; ++k) {
      if (start[k + 1] > 0) result.segments.push_back({k, start[k], start[k] + start[k + 1]});
      start[k + 1] += start[k];
    }
    result.order.resize(start[mask + 1]);
    for (int64_t i = 0; i < n; ++i)
      if (counts(labels[i])) result.order[start[labels[i]]++] = static_cast<int32_t>(i);
    return result;
  }

  struct Row {
    uint32_t label;
    int32_t row;
  };
  std::vector<Row> rows, other;
  rows.reserve(n);
  for (int64_t i = 0; i < n; ++i)
    if (counts(labels[i])) rows.push_back({static_cast<uint32_t>(labels[i]), static_cast<int32_t>(i)});
  other.resize(rows.size());
  for (int pass = 0, shift = 0; pass < passes; ++pass, shift += digit) {
    std::fill(start.begin(), start.end(), 0);
    for (const Row& r : rows) ++start[((r.label >> shift) & mask) + 1];
    for (uint32_t d = 0; d < mask; ++d) start[d + 1] += start[d];
    for (const Row& r : rows) other[start[(r.label >> shift) & mask]++] = r;
    rows.swap(other);
  }
  result.order.reserve(rows.size());
  for (const Row& r : rows) {
    const int64_t at = static_cast<int64_t>(result.order.size());
    if (result.segments.empty() || result.segments.back().label != r.label)
      result.segments.push_back({r.label, at, at});
    result.order.push_back(r.row);
    result.segments.back().end = at + 1;
  }
  return result;
}

}  // namespace dlkernels
