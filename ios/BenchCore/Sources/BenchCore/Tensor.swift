// Tensors, in memory of their own or as views of another's, and the safetensors files that hold them.

import Foundation

/// What the harness and the devices agree to exchange.
public enum DType: String, CaseIterable {
  case float32, float16, int64, int32, int8, uint8, bool

  public var size: Int {
    switch self {
    case .int64: return 8
    case .float32, .int32: return 4
    case .float16: return 2
    case .int8, .uint8, .bool: return 1
    }
  }

  fileprivate var stored: String {
    switch self {
    case .float32: return "F32"
    case .float16: return "F16"
    case .int64: return "I64"
    case .int32: return "I32"
    case .int8: return "I8"
    case .uint8: return "U8"
    case .bool: return "BOOL"
    }
  }
}

/// A tensor in row-major order. It is a reference: a cache is written where it lies, and a view sees that.
public final class Tensor: @unchecked Sendable {
  public static let most = 1 << 40

  public let dtype: DType
  public let shape: [Int]
  public let bytes: UnsafeMutableRawBufferPointer
  private let owner: AnyObject?

  /// All zeros. Throws Trouble for a shape that no memory holds.
  public init(_ dtype: DType, _ shape: [Int]) throws {
    let count = try Self.count(shape) * dtype.size
    self.dtype = dtype
    self.shape = shape
    owner = nil
    guard let memory = calloc(max(count, 1), 1) else { throw Trouble("no memory for a tensor of \(count) bytes") }
    bytes = UnsafeMutableRawBufferPointer(start: memory, count: count)
  }

  private init(_ dtype: DType, _ shape: [Int], _ bytes: UnsafeMutableRawBufferPointer, owner: AnyObject) {
    self.dtype = dtype
    self.shape = shape
    self.bytes = bytes
    self.owner = owner
  }

  deinit { if owner == nil { free(bytes.baseAddress) } }

  /// The number of elements. Throws Trouble for a negative size, or more than 2 to the 40.
  public static func count(_ shape: [Int]) throws -> Int {
    var count = 1
    for size in shape {
      let (product, overflow) = count.multipliedReportingOverflow(by: size)
      if size < 0 || overflow || product > most { throw Trouble("a tensor cannot have the shape \(shape)") }
      count = product
    }
    return count
  }

  public var count: Int { bytes.count / dtype.size }

  /// The same elements under another shape or as a part of them, in the same memory.
  private func view(_ shape: [Int], at offset: Int, _ length: Int) -> Tensor {
    let part = UnsafeMutableRawBufferPointer(rebasing: bytes[offset..<offset + length])
    return Tensor(dtype, shape, part, owner: owner ?? self)
  }

  /// Rows of (1, T, ...): a view. Throws Trouble where there are fewer.
  public func rows(_ range: Range<Int>) throws -> Tensor {
    guard shape.count >= 2, shape[0] == 1, range.lowerBound >= 0, range.upperBound <= shape[1] else {
      throw Trouble("a tensor of the shape \(shape) has no rows \(range.lowerBound) to \(range.upperBound)")
    }
    let width = shape[1] == 0 ? 0 : bytes.count / shape[1]
    return view([1, range.count] + shape[2...], at: range.lowerBound * width, range.count * width)
  }

  /// Entries of (1, H, n, d), copied.
  public func entries(_ range: Range<Int>) throws -> Tensor {
    guard shape.count == 4 else { throw Trouble("a cache has four axes, not \(shape)") }
    let part = try Tensor(dtype, [shape[0], shape[1], range.count, shape[3]])
    try part.write(self, from: range, at: 0)
    return part
  }

  /// Writes entries of another cache (1, H, m, d) into this one (1, H, n, d), from `at` on. Throws Trouble.
  public func write(_ source: Tensor, from range: Range<Int>, at: Int) throws {
    guard shape.count == 4, source.shape.count == 4, dtype == source.dtype, shape[0] == 1, source.shape[0] == 1,
      shape[1] == source.shape[1], shape[3] == source.shape[3], range.lowerBound >= 0,
      range.upperBound <= source.shape[2], at >= 0, at <= shape[2] - range.count
    else {
      throw Trouble(
        "entries \(range.lowerBound) to \(range.upperBound) of \(source.dtype.rawValue) \(source.shape) do not go into "
          + "\(dtype.rawValue) \(shape) at \(at)")
    }
    let width = shape[3] * dtype.size
    let length = range.count * width
    guard length > 0, let to = bytes.baseAddress, let of = source.bytes.baseAddress else { return }
    for head in 0..<shape[1] {
      memcpy(
        to + (head * shape[2] + at) * width, of + (head * source.shape[2] + range.lowerBound) * width, length)
    }
  }

  /// Throws Trouble where not every element has one.
  public convenience init(_ dtype: DType, _ shape: [Int], wholes: [Int]) throws {
    try self.init(dtype, shape)
    guard wholes.count == count else { throw Trouble("\(wholes.count) numbers do not fill the shape \(shape)") }
    for (i, whole) in wholes.enumerated() {
      switch dtype {
      case .int64: bytes.storeBytes(of: Int64(whole), toByteOffset: i * 8, as: Int64.self)
      case .int32:
        guard let narrow = Int32(exactly: whole) else { throw Trouble("\(whole) is no int32") }
        bytes.storeBytes(of: narrow, toByteOffset: i * 4, as: Int32.self)
      default: throw Trouble("whole numbers are int64 or int32, not \(dtype.rawValue)")
      }
    }
  }

  public convenience init(_ shape: [Int], floats: [Float]) throws {
    try self.init(.float32, shape)
    guard floats.count == count else { throw Trouble("\(floats.count) numbers do not fill the shape \(shape)") }
    floats.withUnsafeBytes { bytes.copyMemory(from: $0) }
  }

  /// Copies elements that lie `strides` apart in somebody's memory. Throws Trouble where they would lie outside of it.
  public convenience init(_ dtype: DType, _ shape: [Int], from source: UnsafeRawBufferPointer, strides: [Int]) throws {
    try self.init(dtype, shape)
    let rows = try rows(lying: strides, in: source.count)
    guard let to = bytes.baseAddress, let of = source.baseAddress else { return }
    for (number, at) in rows.offsets.enumerated() { memcpy(to + number * rows.length, of + at, rows.length) }
  }

  /// Copies all elements to where they lie `strides` apart. Throws Trouble where that is outside of that memory.
  public func copy(to target: UnsafeMutableRawBufferPointer, strides: [Int]) throws {
    let rows = try rows(lying: strides, in: target.count)
    guard let of = bytes.baseAddress, let to = target.baseAddress else { return }
    for (number, at) in rows.offsets.enumerated() { memcpy(to + at, of + number * rows.length, rows.length) }
  }

  /// Where runs of elements begin that lie one behind the other, in bytes, and how long such a run is.
  private func rows(lying strides: [Int], in room: Int) throws -> (offsets: [Int], length: Int) {
    if count == 0 { return ([], 0) }
    var last = 0
    for (size, stride) in zip(shape, strides) {
      let (far, overflow) = (size - 1).multipliedReportingOverflow(by: stride)
      let (sum, more) = last.addingReportingOverflow(far)
      if stride < 0 || overflow || more { throw Trouble("a tensor \(shape) cannot lie \(strides) apart") }
      last = sum
    }
    guard strides.count == shape.count, last < room / dtype.size else {
      throw Trouble("a tensor \(shape) with elements \(strides) apart does not fit into \(room) bytes")
    }
    var length = 1
    var outer = shape.count
    while outer > 0, strides[outer - 1] == length || shape[outer - 1] == 1 {
      length *= shape[outer - 1]
      outer -= 1
    }
    var offsets = [0]
    for axis in 0..<outer {
      offsets = offsets.flatMap { start in (0..<shape[axis]).map { start + $0 * strides[axis] } }
    }
    return (offsets.map { $0 * dtype.size }, length * dtype.size)
  }

  /// All elements as float32 numbers. Throws Trouble for whole numbers.
  public func floats() throws -> [Float] {
    switch dtype {
    case .float32: return (0..<count).map { bytes.loadUnaligned(fromByteOffset: $0 * 4, as: Float.self) }
    case .float16:
      return (0..<count).map { Self.widened(bytes.loadUnaligned(fromByteOffset: $0 * 2, as: UInt16.self)) }
    default: throw Trouble("\(dtype.rawValue) was found where floating-point numbers belong")
    }
  }

  /// All elements, cut to whole numbers. Throws Trouble for what is not finite.
  public func wholes() throws -> [Int] {
    try (0..<count).map { i in
      switch dtype {
      case .int64: return Int(bytes.loadUnaligned(fromByteOffset: i * 8, as: Int64.self))
      case .int32: return Int(bytes.loadUnaligned(fromByteOffset: i * 4, as: Int32.self))
      case .int8: return Int(bytes.load(fromByteOffset: i, as: Int8.self))
      case .uint8, .bool: return Int(bytes.load(fromByteOffset: i, as: UInt8.self))
      case .float32: return try Self.cut(bytes.loadUnaligned(fromByteOffset: i * 4, as: Float.self))
      case .float16: return try Self.cut(Self.widened(bytes.loadUnaligned(fromByteOffset: i * 2, as: UInt16.self)))
      }
    }
  }

  private static func cut(_ number: Float) throws -> Int {
    guard let whole = Int(exactly: number.rounded(.towardZero)) else { throw Trouble("\(number) is no whole number") }
    return whole
  }

  /// The number that 16 bits stand for; Swift has no Float16 on Macs with Intel's processors.
  static func widened(_ bits: UInt16) -> Float {
    let sign: UInt32 = UInt32(bits & 0x8000) << 16
    let exponent = UInt32(bits >> 10) & 0x1F
    let fraction = UInt32(bits) & 0x3FF
    if exponent == 0 {
      let small = Float(fraction) * 0x1p-24
      return sign == 0 ? small : -small
    }
    if exponent == 0x1F { return Float(bitPattern: sign | 0x7F80_0000 | fraction << 13) }
    return Float(bitPattern: sign | (exponent + 112) << 23 | fraction << 13)
  }

  /// Wraps a file that is mapped into memory.
  fileprivate static func mapped(_ dtype: DType, _ shape: [Int], _ file: MappedFile, _ range: Range<Int>) -> Tensor {
    Tensor(dtype, shape, UnsafeMutableRawBufferPointer(rebasing: file.bytes[range]), owner: file)
  }
}

/// A file mapped into memory; what is written there stays in memory.
private final class MappedFile {
  let bytes: UnsafeMutableRawBufferPointer

  init(_ file: URL) throws {
    let name = file.lastPathComponent
    let descriptor = open(file.path, O_RDONLY)
    guard descriptor >= 0 else { throw Trouble("\(name) cannot be read") }
    defer { close(descriptor) }
    var status = stat()
    guard fstat(descriptor, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
      throw Trouble("\(name) is no plain file")
    }
    let size = Int(status.st_size)
    guard size >= 8 else { throw Trouble("\(name) is no safetensors file") }
    guard let memory = mmap(nil, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0), memory != MAP_FAILED else {
      throw Trouble("\(name) cannot be mapped into memory")
    }
    bytes = UnsafeMutableRawBufferPointer(start: memory, count: size)
  }

  deinit { munmap(bytes.baseAddress, bytes.count) }
}

/// Files of named tensors.
public enum Safetensors {
  static let longestHeader = 16 << 20

  /// All tensors of a file, by name, each a view of the mapped file. Throws Trouble.
  public static func read(_ file: URL) throws -> [String: Tensor] {
    let name = file.lastPathComponent
    let mapped = try MappedFile(file)
    let length = UInt64(littleEndian: mapped.bytes.loadUnaligned(fromByteOffset: 0, as: UInt64.self))
    guard length <= UInt64(mapped.bytes.count - 8) else { throw Trouble("\(name) is truncated") }
    guard length <= UInt64(longestHeader) else { throw Trouble("\(name) has a header of \(length) bytes") }
    let start = 8 + Int(length)
    let header = try Json.parse(Data(mapped.bytes[8..<start]), called: "the header of \(name)")
    guard case .object(let members) = header else { throw Trouble("\(name) has no header") }
    let room = mapped.bytes.count - start
    var tensors: [String: Tensor] = [:]
    for member in members where member.name != "__metadata__" {
      let place = "\(name): \(member.name)"
      let fields = try Fields(member.value, place)
      let stored = try fields.text("dtype")
      guard let dtype = DType.allCases.first(where: { $0.stored == stored }) else {
        throw Trouble("\(place) is of the dtype \(stored), which is not exchanged")
      }
      let shape = try fields.wholes("shape", 0...Int(Int32.max))
      let offsets = try fields.wholes("data_offsets", 0...Int.max)
      guard offsets.count == 2, offsets[0] <= offsets[1], offsets[1] <= room else {
        throw Trouble("\(place) lies outside of the file")
      }
      guard offsets[1] - offsets[0] == (try Tensor.count(shape)) * dtype.size else {
        throw Trouble("\(place) has not as many bytes as its shape \(shape) takes")
      }
      tensors[member.name] = .mapped(dtype, shape, mapped, start + offsets[0]..<start + offsets[1])
    }
    return tensors
  }

  /// Writes a file. Throws Trouble.
  public static func write(_ tensors: [String: Tensor], to file: URL) throws {
    // The widest first, so that all of them lie at addresses that are whole numbers of their size.
    let ordered = tensors.sorted { ($1.value.dtype.size, $0.key) < ($0.value.dtype.size, $1.key) }
    var header: [String: Described] = [:]
    var end = 0
    for (name, tensor) in ordered {
      header[name] = Described(
        dtype: tensor.dtype.stored, shape: tensor.shape, data_offsets: [end, end + tensor.bytes.count])
      end += tensor.bytes.count
    }
    do {
      let encoder = JSONEncoder()
      encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
      var text = try encoder.encode(header)
      text.append(Data(repeating: 0x20, count: (8 - text.count % 8) % 8))
      let length = withUnsafeBytes(of: UInt64(text.count).littleEndian) { Data($0) }
      try (length + text).write(to: file)
      let handle = try FileHandle(forWritingTo: file)
      defer { try? handle.close() }
      try handle.seekToEnd()
      for (_, tensor) in ordered { try handle.write(contentsOf: Data(tensor.bytes)) }
    } catch {
      throw Trouble("\(file.lastPathComponent) cannot be written: \(error.localizedDescription)")
    }
  }

  private struct Described: Encodable {
    let dtype: String
    let shape: [Int]
    // swift-format-ignore: AlwaysUseLowerCamelCase
    let data_offsets: [Int]
  }
}
