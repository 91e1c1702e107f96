// From a photo to the pixel values that a vision graph reads, resized as Pillow does it, to within a grey level.

import Foundation

/// A photo as the camera sees it: rows of red, green and blue, a byte each.
public struct Photo {
  public let height: Int
  public let width: Int
  public let pixels: [UInt8]

  public static let mostPixels = 128_000_000
  static let longestSide = 50

  /// Throws Trouble for one that is empty, too large, or a sliver.
  public init(height: Int, width: Int, pixels: [UInt8]) throws {
    let (area, overflow) = height.multipliedReportingOverflow(by: width)
    guard height > 0, width > 0, !overflow, area <= Self.mostPixels else {
      throw Trouble("the photo is \(width) x \(height); it may have at most 128 megapixels")
    }
    guard pixels.count == area * 3 else { throw Trouble("the photo has not three bytes for each pixel") }
    if max(height, width) > Self.longestSide * min(height, width) {
      throw Trouble(
        "the photo is \(width) x \(height); its long side may be at most \(Self.longestSide) times the short")
    }
    self.height = height
    self.width = width
    self.pixels = pixels
  }

  /// From uint8 (H, W, 3).
  public init(_ tensor: Tensor) throws {
    guard tensor.dtype == .uint8, tensor.shape.count == 3, tensor.shape[2] == 3 else {
      throw Trouble("the photo is \(tensor.dtype.rawValue) \(tensor.shape), not uint8 (H, W, 3)")
    }
    try self.init(height: tensor.shape[0], width: tensor.shape[1], pixels: [UInt8](tensor.bytes))
  }

  /// What the model looks at: resized and cropped to `info.height` x `info.width`.
  public func view(_ info: ImageInfo) throws -> Photo {
    var newHeight = info.height
    var newWidth = info.width
    if info.centreCrop {
      // The long side is cut off to a whole pixel, not rounded, as CLIP's preprocessor does it.
      let other = info.resizeShortest * max(height, width) / min(height, width)
      newHeight = height <= width ? info.resizeShortest : other
      newWidth = height <= width ? other : info.resizeShortest
    }
    let wide = resizedRows(to: newWidth, info.resample)
    let resized = resizedColumns(wide, newWidth, to: newHeight, info.resample)
    guard info.centreCrop else { return try Photo(height: newHeight, width: newWidth, pixels: resized) }
    let top = (newHeight - info.height) / 2
    let left = (newWidth - info.width) / 2
    var cropped: [UInt8] = []
    cropped.reserveCapacity(info.height * info.width * 3)
    for y in top..<top + info.height {
      let start = (y * newWidth + left) * 3
      cropped.append(contentsOf: resized[start..<start + info.width * 3])
    }
    return try Photo(height: info.height, width: info.width, pixels: cropped)
  }

  /// The part of the photo that `view` shows, in its own pixels; what lies outside of it was cut off.
  public func seen(_ info: ImageInfo) -> (top: Double, left: Double, height: Double, width: Double) {
    guard info.centreCrop else { return (0, 0, Double(height), Double(width)) }
    let scale = Double(min(height, width)) / Double(info.resizeShortest)
    let (high, wide) = (Double(info.height) * scale, Double(info.width) * scale)
    return ((Double(height) - high) / 2, (Double(width) - wide) / 2, high, wide)
  }

  /// float32 (1, 3, height, width), normalised.
  public func pixelValues(_ info: ImageInfo) throws -> Tensor {
    let view = try view(info)
    let values = try Tensor(.float32, [1, 3, info.height, info.width])
    let out = values.bytes.bindMemory(to: Float.self)
    let area = info.height * info.width
    view.pixels.withUnsafeBufferPointer { pixels in
      for channel in 0..<3 {
        for place in 0..<area {
          let scaled = Float(pixels[place * 3 + channel]) * info.rescale
          out[channel * area + place] = (scaled - info.mean[channel]) / info.std[channel]
        }
      }
    }
    return values
  }

  /// Rows (height, width, 3) -> (height, to, 3).
  private func resizedRows(to: Int, _ resample: ImageInfo.Resample) -> [UInt8] {
    if to == width { return pixels }
    let all = taps(from: width, to: to, resample)
    var out = [UInt8](repeating: 0, count: height * to * 3)
    pixels.withUnsafeBufferPointer { pixels in
      for y in 0..<height {
        for x in 0..<to {
          for channel in 0..<3 {
            var sum = half
            var at = (y * width + all[x].first) * 3 + channel
            for weight in all[x].weights {
              sum += weight * Int(pixels[at])
              at += 3
            }
            out[(y * to + x) * 3 + channel] = UInt8(min(max(sum >> bits, 0), 255))
          }
        }
      }
    }
    return out
  }

  /// Columns (height, width, 3) -> (to, width, 3).
  private func resizedColumns(_ pixels: [UInt8], _ width: Int, to: Int, _ resample: ImageInfo.Resample) -> [UInt8] {
    if to == height { return pixels }
    let all = taps(from: height, to: to, resample)
    let stride = width * 3
    var out = [UInt8](repeating: 0, count: stride * to)
    pixels.withUnsafeBufferPointer { pixels in
      for y in 0..<to {
        for x in 0..<stride {
          var sum = half
          var at = all[y].first * stride + x
          for weight in all[y].weights {
            sum += weight * Int(pixels[at])
            at += stride
          }
          out[y * stride + x] = UInt8(min(max(sum >> bits, 0), 255))
        }
      }
    }
    return out
  }
}

// Weights are whole numbers of this fraction: what is left of 32 bits beside 8 of a sample and 2 for a sum beyond it.
private let bits = 32 - 8 - 2
private let half = 1 << (bits - 1)

/// Of one output sample: where its input samples begin, and their weights.
private struct Taps {
  let first: Int
  let weights: [Int]
}

private func taps(from: Int, to: Int, _ resample: ImageInfo.Resample) -> [Taps] {
  let scale = Double(from) / Double(to)
  let (reach, weight) = kernel(resample)
  if reach == 0 {
    return (0..<to).map { Taps(first: min(from - 1, Int((Double($0) + 0.5) * scale)), weights: [1 << bits]) }
  }
  let stretch = max(scale, 1)
  return (0..<to).map { i in
    let centre = (Double(i) + 0.5) * scale
    let first = max(0, Int(centre - reach * stretch + 0.5))
    let last = min(from, Int(centre + reach * stretch + 0.5))
    let exact = (first..<last).map { weight((Double($0) - centre + 0.5) / stretch) }
    let sum = exact.reduce(0, +)
    let weights = exact.map { part in
      let scaled = (sum != 0 ? part / sum : part) * Double(1 << bits)
      return Int(scaled < 0 ? scaled - 0.5 : scaled + 0.5)
    }
    return Taps(first: first, weights: weights)
  }
}

/// How far a kernel reaches, and its weight at a distance; a reach of 0 takes the nearest sample.
private func kernel(_ resample: ImageInfo.Resample) -> (reach: Double, weight: (Double) -> Double) {
  switch resample {
  case .nearest: return (0, { _ in 1 })
  case .bilinear: return (1, { max(0, 1 - abs($0)) })
  case .bicubic:
    return (
      2,
      { distance in
        let a = -0.5
        let x = abs(distance)
        if x < 1 { return ((a + 2) * x - (a + 3)) * x * x + 1 }
        return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0
      }
    )
  case .lanczos:
    func sinc(_ x: Double) -> Double { x == 0 ? 1 : sin(x * .pi) / (x * .pi) }
    return (3, { abs($0) < 3 ? sinc($0) * sinc($0 / 3) : 0 })
  }
}
