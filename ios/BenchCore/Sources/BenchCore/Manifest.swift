// What a phone reads of a bundle's manifest.json, at one of its keeps.

import Foundation

/// Name, shape and dtype of one input, output or state; the axes in `dynamic` may be shorter than `shape` says.
public struct TensorInfo: Equatable {
  public let name: String
  public let dtype: DType
  public let shape: [Int]
  public let dynamic: Set<Int>

  init(_ json: Json, _ place: String) throws {
    let fields = try Fields(json, place)
    name = try fields.name("name")
    let stated = try fields.text("dtype")
    guard let dtype = DType(rawValue: stated) else {
      throw Trouble("\(place).dtype is \(stated), which is not exchanged")
    }
    self.dtype = dtype
    let shape = try fields.wholes("shape", 1...Int(Int32.max))
    _ = try Tensor.count(shape)
    self.shape = shape
    dynamic = Set(try fields.wholes("dynamic", 0...max(0, shape.count - 1), optional: true))
  }

  public init(name: String, dtype: DType, shape: [Int], dynamic: Set<Int> = []) {
    self.name = name
    self.dtype = dtype
    self.shape = shape
    self.dynamic = dynamic
  }

  /// True for a tensor of the dtype and of a shape that this allows.
  public func fits(_ tensor: Tensor) -> Bool {
    tensor.dtype == dtype && tensor.shape.count == shape.count
      && shape.indices.allSatisfy {
        tensor.shape[$0] == shape[$0] || (dynamic.contains($0) && (1..<shape[$0]).contains(tensor.shape[$0]))
      }
  }

  /// Throws Trouble for a tensor that is not of this dtype, or of a shape that this does not allow.
  public func check(_ tensor: Tensor, of graph: String) throws {
    if !fits(tensor) {
      throw Trouble("\(graph): \(name) is \(dtype.rawValue) \(shape), not \(tensor.dtype.rawValue) \(tensor.shape)")
    }
  }
}

/// One exported graph: its files, the engine it is for, its inputs and outputs in order.
public struct GraphInfo: Equatable {
  /// What the keep at hand calls it, and what its file calls it.
  public let name: String
  public let stored: String
  public let file: String
  public let extraFiles: [String]
  public let engine: String
  public let inputs: [TensorInfo]
  public let outputs: [TensorInfo]
  /// Buffers that the engine keeps between runs; graphs of one file have those of one name in common.
  public let states: [TensorInfo]
  /// True where the file holds other graphs, too, be it those of other keeps.
  public let sharesFile: Bool

  init(_ json: Json, _ place: String, vision: String, sharing: Set<String>) throws {
    let fields = try Fields(json, place)
    stored = try fields.name("name")
    name = stored == vision ? GraphName.vision : stored
    file = try plainPath(fields.text("file"), place)
    extraFiles = try fields.texts("extra_files").map { try plainPath($0, place) }
    engine = try fields.name("engine")
    inputs = try fields.objects("inputs", TensorInfo.init)
    outputs = try fields.objects("outputs", TensorInfo.init)
    states = try fields.objects("states", optional: true, TensorInfo.init)
    sharesFile = sharing.contains(file)
    if inputs.isEmpty || outputs.isEmpty { throw Trouble("\(place) has no inputs or no outputs") }
    for infos in [inputs + states, outputs] where Set(infos.map(\.name)).count != infos.count {
      throw Trouble("\(place) names two tensors alike")
    }
  }

  public init(
    name: String, file: String, engine: String, inputs: [TensorInfo], outputs: [TensorInfo], states: [TensorInfo] = []
  ) {
    self.name = name
    stored = name
    self.file = file
    extraFiles = []
    self.engine = engine
    self.inputs = inputs
    self.outputs = outputs
    self.states = states
    sharesFile = false
  }

  /// The KV cache, be it inputs or states.
  public var cache: [TensorInfo] { (inputs + states).filter { $0.name.hasPrefix("past_") } }

  public func input(_ name: String) throws -> TensorInfo { try Self.named(name, in: inputs, of: self.name) }

  public func output(_ name: String) throws -> TensorInfo { try Self.named(name, in: outputs, of: self.name) }

  private static func named(_ name: String, in infos: [TensorInfo], of graph: String) throws -> TensorInfo {
    guard let info = infos.first(where: { $0.name == name }) else { throw Trouble("\(graph) has no \(name)") }
    return info
  }
}

/// What the graphs are called.
public enum GraphName {
  public static let vision = "vision_encoder"
  public static let embedding = "token_embedding"
  public static let imagePrefill = "image_prefill"
  public static let textPrefill = "text_prefill"
  public static let textDecoder = "text_decoder"
  public static let front = "decoder_front"
  public static let back = "decoder_back"
  public static let head = "lm_head"
}

/// How a photo becomes pixel values.
public struct ImageInfo: Equatable {
  public enum Resample: String { case bicubic, bilinear, lanczos, nearest }

  public let height: Int
  public let width: Int
  public let resizeShortest: Int
  public let rescale: Float
  public let mean: [Float]
  public let std: [Float]
  public let resample: Resample
  public let centreCrop: Bool

  init(_ fields: Fields) throws {
    let size = try fields.wholes("size", 1...8192)
    guard size.count == 2 else { throw Trouble("\(fields.place).size is not height and width") }
    (height, width) = (size[0], size[1])
    resizeShortest = try fields.whole("resize_shortest", 1...8192)
    rescale = Float(try fields.number("rescale", 1e-30...1e30))
    mean = try fields.numbers("mean", -1e30...1e30, count: 3).map { Float($0) }
    std = try fields.numbers("std", 1e-30...1e30, count: 3).map { Float($0) }
    let resample = try fields.text("resample", default: "bicubic")
    guard let known = Resample(rawValue: resample) else { throw Trouble("\(fields.place).resample is \(resample)") }
    self.resample = known
    let colour = try fields.text("color", default: "RGB")
    guard colour == "RGB" else { throw Trouble("\(fields.place).color is \(colour)") }
    centreCrop = try fields.flag("do_center_crop", default: true)
    if centreCrop && resizeShortest < max(height, width) {
      throw Trouble("\(fields.place): the crop would reach outside of the photo")
    }
  }
}

/// The conversation around the image; `suffixText` is nil where only the chat template can write what follows it.
public struct PromptInfo: Equatable {
  public let suffixText: String?
  public let trimsQuestion: Bool
  public let image: Int?

  init(_ fields: Fields) throws {
    suffixText = try fields.optional("suffix_text") == nil ? nil : fields.text("suffix_text")
    trimsQuestion = try fields.flag("trims_question", default: false)
    let special = try fields.optionalFields("special_ids")
    image = try special?.optional("image") == nil ? nil : special?.whole("image", 0...Int(Int32.max))
  }
}

/// How many image tokens there are and are left, the first layer that sees fewer, and the photo's rows and columns.
public struct PruneInfo: Equatable {
  public let imageTokens: Int
  public let keep: Int
  public let cut: Int
  public let rows: Int
  public let columns: Int

  init(_ fields: Fields) throws {
    imageTokens = try fields.whole("image_tokens", 1...Int(Int32.max))
    keep = try fields.whole("keep", 1...imageTokens)
    cut = try fields.whole("cut", 0...10_000)
    let grid = try fields.wholes("grid", 1...Int(Int32.max))
    guard grid.count == 2, grid[0].multipliedReportingOverflow(by: grid[1]) == (imageTokens, false) else {
      throw Trouble("\(fields.place).grid does not hold the \(imageTokens) image tokens")
    }
    (rows, columns) = (grid[0], grid[1])
  }
}

/// How text goes through the text graphs.
public struct TextInfo: Equatable {
  public let tokens: Int
  public let chunk: Int
  public let endIds: Set<Int>

  init(_ fields: Fields) throws {
    tokens = try fields.whole("tokens", 1...Int(Int32.max))
    chunk = try fields.whole("chunk", 1...Int(Int32.max))
    endIds = Set(try fields.wholes("end_ids", 0...Int(Int32.max), optional: true))
  }
}

/// manifest.json at one keep.
public struct Manifest: Equatable {
  public static let schemaVersion = 2
  static let fileName = "manifest.json"
  static let largest = 16 << 20

  public let name: String
  public let model: String
  public let backend: String
  /// Schemes of the parts, such as `int8 / int4`; the precision of what has none.
  public let quantisation: String
  public let prune: PruneInfo
  /// All keeps, the default first.
  public let keeps: [Int]
  public let graphs: [GraphInfo]
  public let image: ImageInfo
  public let prompt: PromptInfo
  public let before: Int
  public let firstText: Int
  public let text: TextInfo?
  /// Sizes of the bundle's files, by path.
  public let files: [String: Int]

  /// Which of several keeps to read.
  public enum Choice {
    /// The first, or the only one there is.
    case standard
    case keep(Int)
    /// The one whose vision graph its file calls so.
    case vision(String)
  }

  /// Reads the manifest of the bundle in a folder. Throws Trouble.
  public init(bundle folder: URL, _ choice: Choice = .standard) throws {
    try self.init(Json.read(folder.appendingPathComponent(Self.fileName), limit: Self.largest), choice)
  }

  init(_ json: Json, _ choice: Choice) throws {
    let fields = try Fields(json, Self.fileName)
    let version = try fields.whole("schema_version", 0...Int(Int32.max))
    if version != Self.schemaVersion {
      throw Trouble(
        "the bundle is of schema version \(version), this app reads \(Self.schemaVersion); use app and bundle of one "
          + "release")
    }
    name = try fields.name("name")
    if try fields.fields("image").optional("tiles") != nil {
      throw Trouble("\(name) sees a photo in tiles, which this app cannot cut; export it without --image-size")
    }
    model = try fields.name("model")
    let target = try fields.fields("target")
    backend = try target.name("backend")
    let precision = try target.text("precision")
    let schemes = try ["quant_vision", "quant_text"].map { try target.text($0, default: precision) }
    quantisation = schemes[0] == schemes[1] ? schemes[0] : schemes.joined(separator: " / ")
    let listed = try fields.objects("keeps", optional: true) { json, place in
      let fields = try Fields(json, place)
      return (prune: try PruneInfo(fields.fields("prune")), graph: try fields.name("graph"))
    }
    let single = try PruneInfo(fields.fields("prune"))
    keeps = listed.isEmpty ? [single.keep] : listed.map(\.prune.keep)
    let chosen = listed.isEmpty ? [(prune: single, graph: GraphName.vision)] : listed
    guard
      let own = chosen.first(where: {
        switch choice {
        case .standard: return true
        case .keep(let keep): return $0.prune.keep == keep
        case .vision(let graph): return $0.graph == graph
        }
      })
    else {
      throw Trouble("\(name) has the keeps \(keeps.map(String.init).joined(separator: ", ")), not what was asked for")
    }
    prune = own.prune
    let others = Set(chosen.map(\.graph)).subtracting([own.graph])
    let entries = try fields.list("graphs", longest: 1000)
    var seen: Set<String> = []
    var sharing: Set<String> = []
    for (number, entry) in entries.enumerated() {
      let file = try Fields(entry, "\(Self.fileName).graphs[\(number)]").text("file")
      if !seen.insert(file).inserted { sharing.insert(file) }
    }
    graphs = try entries.enumerated().map {
      try GraphInfo($1, "\(Self.fileName).graphs[\($0)]", vision: own.graph, sharing: sharing)
    }.filter { !others.contains($0.stored) }
    if graphs.isEmpty || Set(graphs.map(\.name)).count != graphs.count {
      throw Trouble("\(name) has no graphs, or two of one name")
    }
    image = try ImageInfo(fields.fields("image"))
    prompt = try PromptInfo(fields.fields("prompt"))
    let frame = try fields.fields("frame")
    before = try frame.whole("before", 0...Int(Int32.max))
    firstText = try frame.whole("first_text", 1...Int(Int32.max))
    text = try fields.optionalFields("text").map { try TextInfo($0) }
    var files: [String: Int] = [:]
    if let sizes = fields.optional("files"), case .object(let members) = sizes {
      for member in members {
        let place = "\(Self.fileName).files"
        files[try plainPath(member.name, place)] = try Fields(member.value, "\(place).\(member.name)")
          .whole("size_bytes", 0...Int(1 << 53))
      }
    }
    self.files = files
  }

  public func graph(_ name: String) -> GraphInfo? { graphs.first { $0.name == name } }

  /// Throws Trouble where a file of a graph is not there in the size that the manifest states.
  public func checkFiles(in folder: URL) throws {
    for graph in graphs {
      for file in graph.engine == "coreml" ? graph.extraFiles : [graph.file] + graph.extraFiles {
        guard let stated = files[file] else { throw Trouble("\(Self.fileName) does not list \(file)") }
        let values = try? folder.appendingPathComponent(file).resourceValues(forKeys: [.isRegularFileKey, .fileSizeKey])
        guard values?.isRegularFile == true, let size = values?.fileSize else { throw Trouble("\(file) is missing") }
        if size != stated { throw Trouble("\(file) has \(size) bytes, not \(stated): copy the bundle again") }
      }
    }
  }
}

/// A path that stays inside a folder. Throws Trouble for any other.
private func plainPath(_ path: String, _ place: String) throws -> String {
  let parts = path.split(separator: "/", omittingEmptySubsequences: false)
  guard !parts.contains(where: { ["", ".", ".."].contains($0) }), !path.contains("\\"), !path.contains(":"),
    path.unicodeScalars.allSatisfy({ $0.value >= 32 }), path.unicodeScalars.count <= 512
  else { throw Trouble("\(place) names \(path.prefix(100)), which is no plain path inside the bundle") }
  return path
}
