// One bundle, open: photos are seen and questions answered one behind the other, away from the main thread.

import BenchCore
import Foundation
import UIKit

/// What the screen shows of a photo that was seen.
struct Seen: Sendable {
  let imageReadyMs: Double
  /// Row by row, which image tokens were kept; empty where no graph tells.
  let kept: [Int]
  let rows: Int
  let columns: Int
  /// The part of the photo that the model sees, of 1 in both directions.
  let part: CGRect
}

/// All engines of this app.
func allEngines() -> [Engine] { [CoreMLEngine(), ExecuTorchEngine()] }

/// The folder that a computer copies bundles and jobs to.
func documents() -> URL { FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)[0] }

/// An open bundle. All of its work happens on one queue, which is what makes it safe to share.
final class Bench: @unchecked Sendable {
  private let queue = DispatchQueue(label: "bench", qos: .userInitiated)
  private let manifest: Manifest
  private let answers: Answers
  private let prompt: Prompt

  private init(_ folder: URL, keep: Int?) throws {
    manifest = try Manifest(bundle: folder, keep.map { .keep($0) } ?? .standard)
    answers = try Answers(Graphs(manifest, in: folder, engines: allEngines()))
    prompt = try Prompt(Tokenizer(bundle: folder), manifest.prompt)
  }

  /// Opens the bundle in a folder at one of its keeps, by default the first. Throws Trouble.
  static func open(_ folder: URL, keep: Int? = nil) async throws -> Bench {
    try await Task.detached { try Bench(folder, keep: keep) }.value
  }

  /// Names of the bundles in the documents folder.
  static func bundles() -> [String] {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: documents().path)) ?? []
    return names.sorted().filter {
      FileManager.default.fileExists(atPath: documents().appendingPathComponent("\($0)/manifest.json").path)
    }
  }

  /// Prefills a photo. Throws Trouble.
  func see(_ image: UIImage) async throws -> Seen {
    try await withCheckedThrowingContinuation { done in
      queue.async { done.resume(with: Result { try self.seen(image) }) }
    }
  }

  private func seen(_ image: UIImage) throws -> Seen {
    let photo = try Photo(image)
    try answers.see(photo.pixelValues(manifest.image))
    let part = photo.seen(manifest.image)
    let (height, width) = (Double(photo.height), Double(photo.width))
    return Seen(
      imageReadyMs: answers.times.imageReady, kept: answers.kept ?? [], rows: manifest.prune.rows,
      columns: manifest.prune.columns,
      part: CGRect(
        x: part.left / width, y: part.top / height, width: part.width / width, height: part.height / height))
  }

  /// Pieces of an answer about the photo that was seen last; `first` gets the time to the first token.
  func ask(
    _ question: String, most: Int = 200, first: @escaping @Sendable (Double) -> Void
  ) -> AsyncThrowingStream<String, Error> {
    AsyncThrowingStream { pieces in
      queue.async {
        do {
          var text = self.prompt.stream()
          let ids = try self.prompt.ids(of: question)
          let room = self.answers.room - ids.count + 1
          var count = 0
          try self.answers.answer(ids, most: min(most, room), sampling: Sampling()) { token in
            count += 1
            if count == 1 { first(self.answers.times.ttftQuestion) }
            // Whoever listened may have gone.
            if case .terminated = pieces.yield(text.append(token)) { return false }
            return true
          }
          pieces.yield(text.finish())
          pieces.finish()
        } catch {
          pieces.finish(throwing: error)
        }
      }
    }
  }
}

extension Photo {
  /// The pixels of an image as it is looked at, transparency laid on white. Throws Trouble.
  init(_ image: UIImage) throws {
    let size = CGSize(width: image.size.width * image.scale, height: image.size.height * image.scale)
    guard size.width >= 1, size.height >= 1, size.width * size.height <= Double(Photo.mostPixels) else {
      throw Trouble("the photo is \(size.width) x \(size.height); it may have at most 128 megapixels")
    }
    let format = UIGraphicsImageRendererFormat()
    format.scale = 1
    format.opaque = true
    // Drawing turns it upright, whichever way the camera was held.
    let upright = UIGraphicsImageRenderer(size: size, format: format).image { context in
      UIColor.white.setFill()
      context.fill(CGRect(origin: .zero, size: size))
      image.draw(in: CGRect(origin: .zero, size: size))
    }
    guard let drawn = upright.cgImage else { throw Trouble("the photo cannot be drawn") }
    let (width, height) = (drawn.width, drawn.height)
    var four = [UInt8](repeating: 0, count: width * height * 4)
    let isDrawn = four.withUnsafeMutableBytes { bytes -> Bool in
      guard
        let context = CGContext(
          data: bytes.baseAddress, width: width, height: height, bitsPerComponent: 8, bytesPerRow: width * 4,
          space: CGColorSpaceCreateDeviceRGB(), bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
      else { return false }
      context.draw(drawn, in: CGRect(x: 0, y: 0, width: width, height: height))
      return true
    }
    if !isDrawn { throw Trouble("the photo cannot be drawn") }
    var pixels = [UInt8](repeating: 0, count: width * height * 3)
    for place in 0..<width * height {
      for channel in 0..<3 { pixels[place * 3 + channel] = four[place * 4 + channel] }
    }
    try self.init(height: height, width: width, pixels: pixels)
  }
}
