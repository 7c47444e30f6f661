// How the rows of the classes are cut into pieces: torch-free, for the host side and for the tests of the loops.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../common/segments.h"
#include "center_loss_kernel.h"

namespace dlkernels {

struct CenterPieces {
  Segments by_class;
  std::vector<CenterPiece> pieces;   // in the order of the classes
  std::vector<CenterClass> classes;  // those with slots
  int64_t slots = 0;

  CenterPieces() = default;
  // all: every class keeps its sum in slots, also one that is done with at once.
  CenterPieces(Segments rows, bool all) : by_class(std::move(rows)) {
    for (const Segment& s : by_class.segments) {
      const int64_t count = s.end - s.begin, parts = (count + kPieceRows - 1) / kPieceRows;
      const bool whole = parts == 1 && !all;
      if (!whole) classes.push_back({s.label, slots, parts, count});
      for (int64_t begin = s.begin; begin < s.end; begin += kPieceRows)
        pieces.push_back({s.label, begin, std::min(begin + kPieceRows, s.end), whole ? -1 : slots++, count});
    }
  }
};

}  // namespace dlkernels
