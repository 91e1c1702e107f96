// What crosses the cable: job.json to the phone, findings.json back. Times are milliseconds, sizes bytes.
//
// runtime/devices/wire.py is the contract; docs/job.schema.json and docs/findings.schema.json are made from it.

import Foundation

/// job.json: what to run.
public struct Job: Equatable {
  public static let version = 1
  public static let fileName = "job.json"
  public static let inputsName = "inputs.safetensors"
  static let largest = 64 << 20

  /// One run of a graph on the golden's inputs.
  public struct Step: Equatable {
    public let graph: String
    public let stored: String
    public let step: String

    init(_ json: Json, _ place: String) throws {
      let fields = try Fields(json, place, only: ["graph", "stored", "step"])
      (graph, stored, step) = (try fields.name("graph"), try fields.name("stored"), try fields.name("step"))
    }
  }

  /// The question behind the photo, and how many tokens to answer with, past any end.
  public struct Answer: Equatable {
    public let question: [Int]
    public let newTokens: Int

    init(_ fields: Fields) throws {
      question = try fields.wholes("question", 0...Int(Int32.max))
      newTokens = try fields.whole("new_tokens", 1...Int(Int32.max))
      if question.isEmpty { throw Trouble("\(fields.place).question is empty") }
    }
  }

  /// Runs of each graph before and while it is timed, and of whole answers behind one that warms up.
  public struct Timing: Equatable {
    public let warmup: Int
    public let runs: Int
    public let answers: Int

    init(_ fields: Fields) throws {
      warmup = try fields.whole("warmup", 0...1_000_000, default: 2)
      runs = try fields.whole("runs", 1...1_000_000, default: 10)
      answers = try fields.whole("answers", 1...40_000, default: 5)
    }
  }

  /// The unpruned twin, whose answers are timed in turns with the bundle's.
  public struct Twin: Equatable {
    public let bundle: String
    public let folder: String
    public let vision: String

    init(_ fields: Fields) throws {
      bundle = try fields.name("bundle")
      folder = try fields.text("folder", default: "twin")
      vision = try fields.name("vision")
      if folder != "twin" { throw Trouble("\(fields.place).folder is not twin") }
    }
  }

  /// How cool a device must be before it is timed, and how long it may take to become so.
  public struct Gate: Equatable {
    public let mostCelsius: Double
    public let waitS: Double

    init(_ fields: Fields) throws {
      mostCelsius = try fields.number("most_celsius", Double.leastNonzeroMagnitude...100, default: 37)
      waitS = try fields.number("wait_s", 0...3600, default: 600)
    }
  }

  public let id: String
  public let bundle: String
  public let folder: String
  public let vision: String
  public let steps: [Step]
  public let answer: Answer?
  public let threads: Int
  public let timing: Timing?
  public let twin: Twin?
  public let gate: Gate?

  /// Reads the job in a folder. Throws Trouble.
  public init(in folder: URL) throws {
    try self.init(Json.read(folder.appendingPathComponent(Self.fileName), limit: Self.largest))
  }

  init(_ json: Json) throws {
    let place = Self.fileName
    let version = try Fields(json, place).whole("job_version", 0...Int(Int32.max), default: Self.version)
    if version != Self.version {
      throw Trouble(
        "\(place) is of version \(version), this app runs \(Self.version); use app and pruneport of one release")
    }
    let fields = try Fields(
      json, place,
      only: [
        "id", "bundle", "folder", "vision", "steps", "answer", "threads", "timing", "twin", "gate", "job_version",
      ])
    id = try fields.text("id")
    guard id.utf8.count == 16, id.utf8.allSatisfy({ (0x30...0x39).contains($0) || (0x61...0x66).contains($0) }) else {
      throw Trouble("\(place).id is not 16 lower-case hexadecimal digits")
    }
    bundle = try fields.name("bundle")
    folder = try fields.text("folder", default: "bundle")
    if folder != "bundle" { throw Trouble("\(place).folder is not bundle") }
    vision = try fields.name("vision")
    steps = try fields.objects("steps", Step.init)
    if steps.count > 10_000 { throw Trouble("\(place).steps has more than 10000 entries") }
    answer = try fields.optionalFields("answer", only: ["question", "new_tokens"]).map { try Answer($0) }
    threads = try fields.whole("threads", 0...256, default: 0)
    timing = try fields.optionalFields("timing", only: ["warmup", "runs", "answers"]).map { try Timing($0) }
    twin = try fields.optionalFields("twin", only: ["bundle", "folder", "vision"]).map { try Twin($0) }
    gate = try fields.optionalFields("gate", only: ["most_celsius", "wait_s"]).map { try Gate($0) }
  }
}

/// findings.json: what came of a job. Its fields are those of the contract, in its words.
public struct Findings: Encodable {
  public static let version = 1
  public static let fileName = "findings.json"
  public static let outputsName = "outputs.safetensors"
  public static let minibenchName = "benchmark_results.json"

  public struct Device: Encodable {
    public enum Kind: String, Encodable { case phone, emulated, simulator, desktop }

    public let name: String
    public let kind: Kind
    public let os: String
    public let abi: String
    public let soc: String
    public let cores: Int
    public let ramBytes: Int

    public init(name: String, kind: Kind, os: String, abi: String, soc: String, cores: Int, ramBytes: Int) {
      (self.name, self.kind, self.os, self.abi) = (name, kind, os, abi)
      (self.soc, self.cores, self.ramBytes) = (soc, cores, ramBytes)
    }
  }

  public struct Runner: Encodable {
    public let name: String
    public let version: String
    public let engine: String
    public let engineVersion: String
    public let engineCommit: String
  }

  /// The state of the device so long after the job began; nil for what its system does not tell.
  public struct Condition: Encodable {
    public var atMs: Double
    public let thermal: String?
    public let celsius: Double?
    public let battery: Double?
    public let charging: Bool?
    public let lowPower: Bool?

    public init(
      thermal: String? = nil, celsius: Double? = nil, battery: Double? = nil, charging: Bool? = nil,
      lowPower: Bool? = nil
    ) {
      atMs = 0
      (self.thermal, self.celsius, self.battery) = (thermal, celsius, battery)
      (self.charging, self.lowPower) = (charging, lowPower)
    }
  }

  public struct Load: Encodable {
    public var firstMs: [Double] = []
    public var laterMs: [Double] = []
  }

  /// `passed` is null where there is no thermometer.
  public struct Gate: Encodable {
    public var waitedS: Double
    public var passed: Bool?

    enum CodingKeys: String, CodingKey { case waitedS, passed }

    public func encode(to encoder: Encoder) throws {
      var container = encoder.container(keyedBy: CodingKeys.self)
      try container.encode(waitedS, forKey: .waitedS)
      try container.encode(passed, forKey: .passed)
    }
  }

  public struct Why: Encodable {
    public let message: String
    public let missing: Bool

    init(_ error: Error) {
      let trouble = error as? Trouble ?? Trouble(String(describing: error))
      message = String(String.UnicodeScalarView(trouble.message.unicodeScalars.prefix(4000)))
      missing = trouble.missing
    }
  }

  public struct Step: Encodable {
    public let graph: String
    public let step: String
    public var loadMs: [Double] = []
    public var warmupMs: [Double] = []
    public var runMs: [Double] = []
    public var trouble: Why?
  }

  public struct AnswerRun: Encodable {
    public let twin: Bool
    public let warmup: Bool
    public let preprocessMs: Double
    public let visionMs: Double
    public let imagePrefillMs: Double
    public let imageReadyMs: Double
    public let questionPrefillMs: Double
    public let ttftQuestionMs: Double
    public let ttftPhotoMs: Double
    public let tokenMs: [Double]

    init(_ times: AnswerTimes, preprocess: Double, twin: Bool, warmup: Bool) {
      (self.twin, self.warmup, preprocessMs) = (twin, warmup, preprocess)
      (visionMs, imagePrefillMs, imageReadyMs) = (times.vision, times.imagePrefill, times.imageReady)
      (questionPrefillMs, ttftQuestionMs, tokenMs) = (times.questionPrefill, times.ttftQuestion, times.tokens)
      ttftPhotoMs = preprocess + times.imageReady + times.ttftQuestion
    }
  }

  public struct Answer: Encodable {
    public var ids: [Int] = []
    public var cacheBytes: Int?
    public let imageTokensBefore: Int
    public let imageTokensAfter: Int
    public let questionTokens: Int
    public var runs: [AnswerRun] = []
    public var trouble: Why?
  }

  public struct Memory: Encodable {
    public let peakRssBytes: Int
    public let afterCloseBytes: Int?
  }

  public let job: String
  public let bundle: String
  public let twin: String?
  public let device: Device
  public let runner: Runner
  public let threads: Int
  public let startedUtc: String
  public var endedUtc: String
  public var load = Load()
  public var gate: Gate?
  public var conditions: [Condition] = []
  public var photoRefused = ""
  public var steps: [Step] = []
  public var answer: Answer?
  public var memory: Memory?
  public var accumulatorBits: Int?
  public var trouble: Why?
  public let findingsVersion = Findings.version

  /// Writes the tensors and what minibench's readers look for, then findings.json: where that is, all is. Throws Trouble.
  public func write(_ outputs: [String: Tensor], minibench: [Minibench], to folder: URL) throws {
    do {
      try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
      try Safetensors.write(outputs, to: folder.appendingPathComponent(Self.outputsName))
      let encoder = JSONEncoder()
      encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
      try encoder.encode(minibench).write(to: folder.appendingPathComponent(Self.minibenchName), options: .atomic)
      encoder.keyEncodingStrategy = .convertToSnakeCase
      try encoder.encode(self).write(to: folder.appendingPathComponent(Self.fileName), options: .atomic)
    } catch let error as Trouble {
      throw error
    } catch {
      throw Trouble("the findings cannot be written: \(error.localizedDescription)")
    }
  }
}

/// One entry of `benchmark_results.json`, in the shape that ExecuTorch's minibench leaves.
public struct Minibench: Encodable {
  struct Model: Encodable {
    let name: String
    let backend: String
    let quantization: String
  }

  struct DeviceInfo: Encodable {
    let device: String
    let arch: String
    let os: String
    let totalMem: Int
    let availMem: Int
  }

  let benchmarkModel: Model
  let metric: String
  let actualValue: Double
  let targetValue: Double
  let deviceInfo: DeviceInfo

  /// Medians of what was found; nothing for what was not timed.
  static func entries(_ findings: Findings, _ manifest: Manifest, availableBytes: Int) -> [Minibench] {
    let device = DeviceInfo(
      device: findings.device.name, arch: findings.device.abi, os: findings.device.os,
      totalMem: findings.device.ramBytes, availMem: availableBytes)
    func entry(_ name: String, _ metric: String, _ samples: [Double]) -> Minibench? {
      guard let value = median(samples) else { return nil }
      let model = Model(name: name, backend: manifest.backend, quantization: manifest.quantisation)
      return Minibench(benchmarkModel: model, metric: metric, actualValue: value, targetValue: 0, deviceInfo: device)
    }
    let name = manifest.name
    let runs = findings.answer?.runs.filter { !$0.warmup && !$0.twin } ?? []
    let load = findings.load.laterMs.isEmpty ? findings.load.firstMs : findings.load.laterMs
    let steps = findings.steps.map { step in
      entry(
        "\(name)/\(step.step == step.graph ? step.graph : "\(step.graph)@\(step.step)")", "inference_time(ms)",
        step.runMs)
    }
    let whole = [
      entry(name, "model_load_time(ms)", load),
      entry(name, "image_ready(ms)", runs.map(\.imageReadyMs)),
      entry(name, "time_to_first_token(ms)", runs.map(\.ttftPhotoMs)),
      entry(name, "token_per_sec", runs.flatMap(\.tokenMs).filter { $0 > 0 }.map { 1000 / $0 }),
    ]
    return (steps + whole).compactMap { $0 }
  }
}

func median(_ samples: [Double]) -> Double? {
  if samples.isEmpty { return nil }
  let sorted = samples.sorted()
  return (sorted[(sorted.count - 1) / 2] + sorted[sorted.count / 2]) / 2
}
