// How the next token is chosen.

import Foundation

/// Greedily at temperature 0, else from the likeliest tokens that together reach `topP`, by a seeded draw.
public struct Sampling {
  public let temperature: Double
  public let topP: Double
  private var chance: Chance

  /// Throws Trouble for what lies outside of 0...100 and of 0 (excluded) to 1.
  public init(temperature: Double = 0, topP: Double = 1, seed: UInt64 = 0) throws {
    guard (0...100).contains(temperature), topP > 0, topP <= 1 else {
      throw Trouble("temperature lies in 0...100 and top_p above 0 and at most at 1")
    }
    self.temperature = temperature
    self.topP = topP
    chance = Chance(state: seed)
  }

  /// One token for logits (V,); the first one on ties where the likeliest counts.
  ///
  /// Throws Trouble for logits from which none can be chosen.
  public mutating func choose(_ logits: [Float]) throws -> Int {
    guard var largest = logits.first else { throw Trouble("the graph gave no logits") }
    var best = 0
    for (token, value) in logits.enumerated() {
      if value.isNaN { throw Trouble("the graph gave not a number instead of logits") }
      if value > largest { (best, largest) = (token, value) }
    }
    if largest == -.infinity { throw Trouble("the graph gave minus infinity for all instead of logits") }
    if temperature == 0 { return best }
    // Below the largest, which may be infinite, before they are divided by what may be next to nothing.
    let weights = logits.map { $0 == largest ? 1 : exp((Double($0) - Double(largest)) / temperature) }
    let order = logits.indices.sorted { (weights[$1], $0) < (weights[$0], $1) }
    let all = weights.reduce(0, +)
    var reached = 0.0
    var kept = 0
    for token in order {
      reached += weights[token] / all
      kept += 1
      // The likeliest up to and including the one that reaches top_p.
      if topP < 1 && reached >= topP * (1 - 1e-12) { break }
    }
    var left = chance.next() * reached
    for token in order[..<kept] {
      left -= weights[token] / all
      if left < 0 { return token }
    }
    // Rounding left nothing to draw from: the last that may come at all.
    return order[..<kept].last { weights[$0] > 0 } ?? best
  }
}

/// Numbers in 0..<1 by SplitMix64: the same for one seed on every system.
private struct Chance {
  var state: UInt64

  mutating func next() -> Double {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ (mixed >> 30)) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ (mixed >> 27)) &* 0x94D0_49BB_1331_11EB
    return Double((mixed ^ (mixed >> 31)) >> 11) * 0x1p-53
  }
}
