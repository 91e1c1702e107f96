// Runs a job: job.json and inputs.safetensors in, findings.json and outputs.safetensors out.

import Foundation

/// The phone, or whatever runs a job, as its system tells.
public protocol Device: AnyObject {
  var info: Findings.Device { get }
  func condition() -> Findings.Condition
  /// True where the system itself says that heat slows it down; it may have no thermometer that says how hot.
  var isThrottled: Bool { get }
  /// Bytes of this process: the highest so far, and now.
  var peakBytes: Int { get }
  var bytes: Int { get }
  /// Bytes that this process may still take; 0 where the system does not tell.
  var availableBytes: Int { get }
}

/// One walk over a job.
public final class JobRun {
  /// The folder that holds job.json, inputs.safetensors, bundle and perhaps twin.
  private let place: URL
  private let job: Job
  private let device: Device
  private let engines: [Engine]
  private let say: (String) -> Void
  private let start = DispatchTime.now()
  private var findings: Findings
  private var inputs: [String: Tensor] = [:]
  private var outputs: [String: Tensor] = [:]
  private var photoMs = 0.0
  private var manifest: Manifest?
  private var waitedS = 0.0

  /// `app` names the program and its version; `say` hears one line a stage. Throws Trouble for what is no job.
  public init(
    in place: URL, device: Device, engines: [Engine], app: (name: String, version: String),
    say: @escaping (String) -> Void = { _ in }
  ) throws {
    (self.place, self.device, self.engines, self.say) = (place, device, engines, say)
    let job = try Job(in: place)
    self.job = job
    // Of a bundle whose graphs go to several engines, the one that has the vision graph is named.
    let folder = place.appendingPathComponent(job.folder)
    let graph = try? Manifest(bundle: folder, .vision(job.vision)).graph(GraphName.vision)
    let engine = engines.first { $0.name == graph?.engine } ?? engines.first
    findings = Findings(
      job: job.id, bundle: job.bundle, twin: job.twin?.bundle, device: device.info,
      runner: Findings.Runner(
        name: app.name, version: app.version, engine: engine?.name ?? graph?.engine ?? "none",
        engineVersion: engine?.version ?? "none", engineCommit: engine?.commit ?? ""),
      threads: min(max(engine?.threads(job.threads) ?? 1, 1), 1024), startedUtc: now(), endedUtc: now())
  }

  /// Runs everything and writes the findings into a folder. Throws Trouble where not even they can be written.
  @discardableResult
  public func run(to folder: URL) throws -> Findings {
    look()
    do {
      inputs = try Safetensors.read(place.appendingPathComponent(Job.inputsName))
      let graphs = try openBundle()
      try probe()
      let photo = takePhoto(graphs.manifest.image)
      for step in job.steps { findings.steps.append(run(step, graphs)) }
      if let wanted = job.answer { findings.answer = answer(wanted, graphs, photo) }
    } catch {
      findings.trouble = Findings.Why(error)
    }
    look()
    // All graphs are closed here.
    findings.memory = Findings.Memory(peakRssBytes: device.peakBytes, afterCloseBytes: device.bytes)
    findings.endedUtc = now()
    let minibench = manifest.map { Minibench.entries(findings, $0, availableBytes: device.availableBytes) }
    try findings.write(outputs, minibench: minibench ?? [], to: folder)
    return findings
  }

  private func look() {
    var condition = device.condition()
    condition.atMs = milliseconds(since: start)
    findings.conditions.append(condition)
  }

  /// Opens the graphs: twice where this is the first start, if that prepares files for the later ones.
  private func openBundle() throws -> Graphs {
    let folder = place.appendingPathComponent(job.folder)
    let manifest = try Manifest(bundle: folder, .vision(job.vision))
    self.manifest = manifest
    let prepared = try manifest.graphs.map { try engine(for: $0, among: engines).preparation(of: $0, in: folder) }
    say("opening the graphs")
    func opened() throws -> (Graphs, Double) {
      let start = DispatchTime.now()
      let graphs = try Graphs(manifest, in: folder, engines: engines)
      return (graphs, milliseconds(since: start))
    }
    if prepared.contains(.missing) { findings.load.firstMs.append(try opened().1) }
    let (graphs, spent) = try opened()
    if prepared.allSatisfy({ $0 == .none }) {
      findings.load.firstMs.append(spent)
    } else {
      findings.load.laterMs.append(spent)
    }
    return graphs
  }

  private func input(_ name: String) throws -> Tensor {
    guard let tensor = inputs[name] else { throw Trouble("\(Job.inputsName) has no \(name)") }
    return tensor
  }

  /// In how many bits float16 products are added up here: ones are lost beside 2048 where sums are float16.
  private func probe() throws {
    let file = "accumulator.pte"
    guard FileManager.default.fileExists(atPath: place.appendingPathComponent(file).path) else { return }
    let (rows, depth, columns) = (8, 256, 16)
    let graph = GraphInfo(
      name: "forward", file: file, engine: "executorch",
      inputs: [TensorInfo(name: "row", dtype: .float16, shape: [1, rows, depth])],
      outputs: [TensorInfo(name: "sums", dtype: .float16, shape: [1, rows, columns])])
    guard let engine = try? engine(for: graph, among: engines) else { return }
    let row = try Tensor(.float16, [1, rows, depth])
    let (one, large): (UInt16, UInt16) = (0x3C00, 0x6800)
    for i in 0..<rows * depth {
      row.bytes.storeBytes(of: i % depth == 0 ? large : one, toByteOffset: i * 2, as: UInt16.self)
    }
    guard let sums = try engine.open(graph, in: place).run(["row": row], states: nil)["sums"] else { return }
    // 2048 + 255 rounds to 2304 in float16; 2302 is the number before it.
    findings.accumulatorBits = try sums.floats().allSatisfy { $0 >= 2302 } ? 32 : 16
  }

  private func run(_ step: Job.Step, _ graphs: Graphs) -> Findings.Step {
    var found = Findings.Step(graph: step.graph, step: step.step)
    do {
      say("running \(step.graph == step.step ? step.graph : "\(step.graph) at \(step.step)")")
      let runner = try graphs[step.graph]
      let key = "\(step.graph)/\(step.step)/"
      let given = try runner.info.inputs.reduce(into: [String: Tensor]()) {
        $0[$1.name] = try input("in/\(key)\($1.name)")
      }
      let states = try runner.info.states.isEmpty ? nil : runner.makeStates()
      func prepare() throws {
        for info in runner.info.states {
          let tensor = try input("in/\(key)\(info.name)")
          try info.check(tensor, of: step.graph)
          try states?.write(info.name, tensor)
        }
      }
      try prepare()
      for (name, tensor) in try graphs.run(step.graph, given, states: states) {
        // Copied: the engine may write there again.
        let copy = try Tensor(tensor.dtype, tensor.shape)
        copy.bytes.copyMemory(from: UnsafeRawBufferPointer(tensor.bytes))
        outputs["out/\(key)\(name)"] = copy
      }
      for info in runner.info.states { outputs["state/\(key)\(info.name)"] = try states?.read(info.name) }
      found.loadMs = [runner.loadMs]
      if let timing = job.timing {
        cool()
        for turn in 0..<timing.warmup + timing.runs {
          try prepare()
          let start = DispatchTime.now()
          _ = try graphs.run(step.graph, given, states: states)
          let spent = milliseconds(since: start)
          if turn < timing.warmup { found.warmupMs.append(spent) } else { found.runMs.append(spent) }
        }
        look()
      }
    } catch {
      found.trouble = Findings.Why(error)
    }
    return found
  }

  /// A bundle that is ready to answer.
  private struct Side {
    let manifest: Manifest
    let answers: Answers
  }

  private func answer(_ wanted: Job.Answer, _ graphs: Graphs, _ photo: Photo?) -> Findings.Answer {
    let prune = graphs.manifest.prune
    var found = Findings.Answer(
      imageTokensBefore: prune.imageTokens, imageTokensAfter: prune.keep, questionTokens: wanted.question.count)
    do {
      say("answering")
      // Of the job, so that answers can be compared, or of its photo.
      let pixels = try inputs["pixel_values"] ?? outputs["pixel_values"] ?? input("pixel_values")
      let own = Side(manifest: graphs.manifest, answers: try Answers(graphs))
      found.cacheBytes = own.answers.cacheBytes
      try own.answers.see(pixels)
      found.ids = try own.answers.answer(
        wanted.question, most: wanted.newTokens, sampling: Sampling(), pastEnd: true)
      guard let timing = job.timing else {
        found.runs = [Findings.AnswerRun(own.answers.times, preprocess: photoMs, twin: false, warmup: true)]
        return found
      }
      let twin = try openTwin()
      for turn in 0...timing.answers {
        say("timing answers, \(turn) of \(timing.answers)")
        cool()
        // The first turn warms up; the order is swapped each time, so that drift hits both alike.
        for isTwin in [turn % 2 == 1, turn % 2 == 0] {
          guard let side = isTwin ? twin : own else { continue }
          found.runs.append(try timed(side, wanted, photo, pixels, twin: isTwin, warmup: turn == 0))
        }
        look()
      }
    } catch {
      found.trouble = Findings.Why(error)
    }
    return found
  }

  private func timed(
    _ side: Side, _ wanted: Job.Answer, _ photo: Photo?, _ pixels: Tensor, twin: Bool, warmup: Bool
  ) throws -> Findings.AnswerRun {
    var preprocess = 0.0
    var values = pixels
    if let photo {
      let start = DispatchTime.now()
      values = try photo.pixelValues(side.manifest.image)
      preprocess = milliseconds(since: start)
    }
    try side.answers.see(values)
    try side.answers.answer(wanted.question, most: wanted.newTokens, sampling: Sampling(), pastEnd: true)
    return Findings.AnswerRun(side.answers.times, preprocess: preprocess, twin: twin, warmup: warmup)
  }

  /// The job's photo; its pixel values are compared, and answered about where the job has none.
  private func takePhoto(_ info: ImageInfo) -> Photo? {
    guard let tensor = inputs["photo"] else { return nil }
    do {
      let photo = try Photo(tensor)
      let start = DispatchTime.now()
      outputs["pixel_values"] = try photo.pixelValues(info)
      photoMs = milliseconds(since: start)
      return photo
    } catch {
      findings.photoRefused = Findings.Why(error).message
      return nil
    }
  }

  private func openTwin() throws -> Side? {
    guard let twin = job.twin else { return nil }
    say("opening the twin")
    let folder = place.appendingPathComponent(twin.folder)
    let manifest = try Manifest(bundle: folder, .vision(twin.vision))
    return Side(manifest: manifest, answers: try Answers(Graphs(manifest, in: folder, engines: engines)))
  }

  /// Waits until the device is as cool as the job wants it, or no longer throttled where it has no thermometer.
  private func cool() {
    guard let gate = job.gate else { return }
    let start = DispatchTime.now()
    var celsius = device.condition().celsius
    while celsius.map({ $0 > gate.mostCelsius }) ?? device.isThrottled,
      waitedS + milliseconds(since: start) / 1e3 < gate.waitS
    {
      Thread.sleep(forTimeInterval: 1)
      celsius = device.condition().celsius
    }
    waitedS += milliseconds(since: start) / 1e3
    let before = findings.gate?.passed ?? true
    findings.gate = Findings.Gate(waitedS: waitedS, passed: celsius.map { $0 <= gate.mostCelsius && before })
  }
}

/// 2026-01-31T12:00:00Z
private func now() -> String {
  let formatter = DateFormatter()
  formatter.locale = Locale(identifier: "en_US_POSIX")
  formatter.timeZone = TimeZone(secondsFromGMT: 0)
  formatter.dateFormat = "yyyy-MM-dd'T'HH:mm:ss'Z'"
  return formatter.string(from: Date())
}
