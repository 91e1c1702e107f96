// Answers about a photo: the image is prefilled when it arrives, and a question costs only its own tokens.

import Foundation

/// Milliseconds of one photo and one question.
public struct AnswerTimes {
  public var vision = 0.0
  public var imagePrefill = 0.0
  public var imageReady = 0.0
  public var questionPrefill = 0.0
  public var ttftQuestion = 0.0
  public var tokens: [Double] = []
}

func milliseconds(since start: DispatchTime) -> Double {
  Double(DispatchTime.now().uptimeNanoseconds - start.uptimeNanoseconds) / 1e6
}

/// Answers questions with the open graphs of one bundle, one at a time: it keeps the cache that it writes into.
public final class Answers {
  private let graphs: Graphs
  private let text: TextGraphs
  private let endIds: Set<Int>
  public private(set) var times = AnswerTimes()
  /// Positions of the image tokens of the last photo that were kept, by the unpruned image; nil where no graph tells.
  public private(set) var kept: [Int]?
  private var hasSeen = false

  /// How many text tokens fit into the cache, and how many are read at a time.
  public var room: Int { text.room }
  public var chunk: Int { text.chunk }
  /// Bytes of the KV cache, image and text, once it is full.
  public var cacheBytes: Int { text.cacheBytes }

  /// Throws Trouble where graphs are missing or do not belong together.
  public init(_ graphs: Graphs) throws {
    let manifest = graphs.manifest
    guard let stated = manifest.text else { throw Trouble("\(manifest.name) has no text graphs and cannot answer") }
    self.graphs = graphs
    endIds = stated.endIds
    text = try graphs.has(GraphName.back) ? OpenTextGraphs(graphs) : StaticTextGraphs(graphs)
    if (text.room, text.chunk) != (stated.tokens, stated.chunk) {
      throw Trouble(
        "the manifest of \(manifest.name) says \(stated.tokens) text tokens in chunks of \(stated.chunk), its graphs "
          + "have room for \(text.room) in chunks of \(text.chunk); export again")
    }
  }

  /// Prefills a photo, pixel values (1, 3, H, W). Throws Trouble.
  public func see(_ pixelValues: Tensor) throws {
    hasSeen = false
    times = AnswerTimes()
    let start = DispatchTime.now()
    let seen = try graphs.run(GraphName.vision, ["pixel_values": pixelValues])
    times.vision = milliseconds(since: start)
    let behind = DispatchTime.now()
    try text.see(seen)
    times.imagePrefill = milliseconds(since: behind)
    times.imageReady = milliseconds(since: start)
    kept = try keptTokens(seen)
    hasSeen = true
  }

  private func keptTokens(_ seen: [String: Tensor]) throws -> [Int]? {
    let manifest = graphs.manifest
    guard let positions = try seen["positions"]?.wholes() else { return nil }
    return positions.dropFirst(manifest.before).map { $0 - manifest.before }.filter {
      (0..<manifest.prune.imageTokens).contains($0)
    }
  }

  /// Answers about the photo that was seen last; `say` gets each token and stops the answer by giving false.
  ///
  /// The token that ends the answer is left out; `pastEnd` goes on as if there were none. Everything is refused before
  /// anything runs. Throws Trouble.
  @discardableResult
  public func answer(
    _ question: [Int], most newTokens: Int, sampling: Sampling, pastEnd: Bool = false,
    say: (Int) throws -> Bool = { _ in true }
  ) throws -> [Int] {
    if !hasSeen { throw Trouble("no photo has been seen; show one first") }
    if question.isEmpty { throw Trouble("the question is empty; ask something") }
    // The last token is handed out without being decoded.
    let (needed, overflow) = question.count.addingReportingOverflow(newTokens - 1)
    if newTokens < 1 || overflow || needed > room {
      throw Trouble(
        "a question of \(question.count) tokens and \(newTokens) new ones do not fit into the \(room) entries of the "
          + "text cache; ask shorter, for fewer tokens, or export with more --text-tokens")
    }
    (times.questionPrefill, times.ttftQuestion, times.tokens) = (0, 0, [])
    var sampling = sampling
    var start = DispatchTime.now()
    var logits = try text.read(question, behind: 0)
    times.questionPrefill = milliseconds(since: start)
    var ids: [Int] = []
    while true {
      let token = try sampling.choose(logits)
      let spent = milliseconds(since: start)
      if ids.isEmpty { times.ttftQuestion = spent } else { times.tokens.append(spent) }
      if !pastEnd && endIds.contains(token) { return ids }
      ids.append(token)
      if try !say(token) || ids.count == newTokens { return ids }
      start = DispatchTime.now()
      logits = try text.read([token], behind: question.count + ids.count - 1)
    }
  }
}

/// A set of text graphs with the cache that they work on.
private protocol TextGraphs {
  var room: Int { get }
  var chunk: Int { get }
  var cacheBytes: Int { get }
  /// Fills the cache from what the vision graph gave.
  func see(_ seen: [String: Tensor]) throws
  /// Logits (V,) behind `ids`, whose entries go into the cache behind so many text tokens.
  func read(_ ids: [Int], behind done: Int) throws -> [Float]
}

private func isPart(_ name: String) -> Bool { name.hasPrefix("key_") || name.hasPrefix("value_") }

/// `key_3` of `past_key_3`.
private func part(_ info: TensorInfo) -> String { String(info.name.dropFirst("past_".count)) }

/// Throws Trouble for a cache that is not (1, H, n, d).
private func checkCache(_ infos: [TensorInfo], of graph: String) throws {
  if infos.isEmpty { throw Trouble("\(graph) has no cache") }
  for info in infos where info.shape.count != 4 || info.shape[0] != 1 {
    throw Trouble("\(graph): \(info.name) is \(info.shape), no cache of four axes")
  }
}

/// The number of text tokens that every layer has room for.
private func theOnly(_ rooms: Set<Int>, _ manifest: Manifest) throws -> Int {
  guard rooms.count == 1, let room = rooms.first, room >= 1 else {
    throw Trouble(
      "\(manifest.name): the layers have room for different numbers of text tokens, \(rooms.sorted()); export again")
  }
  return room
}

private func seenTensor(_ seen: [String: Tensor], _ name: String) throws -> Tensor {
  guard let tensor = seen[name] else { throw Trouble("the vision graph does not hand on \(name)") }
  return tensor
}

/// The `row`-th of the logits (1, T, V).
private func logits(_ given: [String: Tensor], row: Int) throws -> [Float] {
  guard let tensor = given["logits"], tensor.shape.count == 3 else {
    throw Trouble("the graph gave no logits (1, T, V)")
  }
  return try tensor.rows(row..<row + 1).floats()
}

/// The first axis behind the batch of an input, its number of tokens.
private func tokens(of info: TensorInfo, _ graph: String) throws -> Int {
  guard info.shape.count >= 2, info.shape[0] == 1 else { throw Trouble("\(graph): \(info.name) is \(info.shape)") }
  return info.shape[1]
}

/// Graphs of any number of tokens; the cache holds what is filled, and grows in blocks.
///
/// What stands before the image is the same for every photo: it is run once, and its entries are kept.
private final class OpenTextGraphs: TextGraphs {
  /// Engines plan their memory anew for every new length, so that the cache grows by so many entries.
  static let block = 64

  let room: Int
  let chunk: Int
  let cacheBytes: Int
  private let graphs: Graphs
  /// Keys and values, by the graph that attends to them.
  private let parts: [(graph: GraphInfo, names: [String])]
  private let infos: [String: TensorInfo]
  private let imageEntries: [String: Int]
  private var past: [String: Tensor] = [:]
  private var prefix: [String: Tensor]?

  init(_ graphs: Graphs) throws {
    self.graphs = graphs
    let vision = try graphs[GraphName.vision].info
    let kept = try tokens(of: vision.output("hidden"), vision.name)
    chunk = try tokens(of: graphs[GraphName.embedding].info.input("ids"), GraphName.embedding)
    _ = try graphs[GraphName.head]
    var parts: [(graph: GraphInfo, names: [String])] = []
    var infos: [String: TensorInfo] = [:]
    for name in [GraphName.front, GraphName.back] where graphs.has(name) {
      let graph = try graphs[name].info
      try checkCache(graph.cache, of: name)
      guard graph.inputs.count >= 2, graph.inputs[1].name == "positions", graph.states.isEmpty else {
        throw Trouble("\(name) takes not what an open graph takes")
      }
      parts.append((graph, graph.cache.map(part)))
      for info in graph.cache { infos[part(info)] = info }
    }
    var seen: [String: Int] = [:]
    for info in vision.outputs where isPart(info.name) && info.shape.count == 4 { seen[info.name] = info.shape[2] }
    let back = try graphs[GraphName.back].info
    let made = Set(seen.keys).union(back.outputs.map(\.name).filter(isPart))
    guard Set(infos.keys) == made else {
      throw Trouble("\(graphs.manifest.name): the graphs do not fill the cache of the layers; export again")
    }
    let imageEntries = Dictionary(uniqueKeysWithValues: infos.keys.map { ($0, seen[$0] ?? kept) })
    let rooms = parts.map { Set($0.names.map { (infos[$0]?.shape[2] ?? 0) - (imageEntries[$0] ?? 0) }) }
    // Those in front of the cut hold every image token, so that their room is the text's; those behind it have room
    // for the largest keep.
    let room = try theOnly(rooms[0], graphs.manifest)
    if let behind = rooms.last, try room > theOnly(behind, graphs.manifest) {
      throw Trouble("\(graphs.manifest.name): the layers behind the cut have less room than those before it")
    }
    cacheBytes = infos.reduce(0) { sum, entry in
      sum + entry.value.shape[1] * ((imageEntries[entry.key] ?? 0) + room) * entry.value.shape[3]
        * entry.value.dtype.size
    }
    self.room = room
    self.parts = parts
    self.infos = infos
    self.imageEntries = imageEntries
  }

  func see(_ seen: [String: Tensor]) throws {
    let start = graphs.manifest.before
    let hidden = try seenTensor(seen, "hidden")
    if prefix == nil {
      let nothing = try backParts().reduce(into: [String: Tensor]()) { $0[$1] = try cache($1, entries: 1) }
      prefix = start == 0 ? nothing : try image(seen, 0..<start, nothing).mapValues { try $0.entries(0..<start) }
    }
    let before = prefix ?? [:]
    guard start < hidden.shape[1] else { throw Trouble("the vision graph hands on no image token") }
    let made = try image(seen, start..<hidden.shape[1], before)
    for (name, entries) in imageEntries {
      let whole = try empty(name, entries: entries)
      if let new = made[name] {
        guard entries > start else { throw Trouble("the vision graph hands on fewer entries of \(name) than tokens") }
        if start > 0, let fixed = before[name] { try whole.write(fixed, from: 0..<start, at: 0) }
        try whole.write(new, from: 0..<entries - start, at: start)
      } else {
        try whole.write(seenTensor(seen, name), from: 0..<entries, at: 0)
      }
      past[name] = whole
    }
  }

  private func backParts() -> [String] { parts.last?.names ?? [] }

  /// Keys and values of the layers behind the cut, of some of the tokens that the vision graph handed on.
  private func image(_ seen: [String: Tensor], _ range: Range<Int>, _ behind: [String: Tensor]) throws
    -> [String: Tensor]
  {
    var inputs = [
      "hidden": try seenTensor(seen, "hidden").rows(range),
      "positions": try seenTensor(seen, "positions").rows(range),
      "filled": try filled(parts.last?.graph, range.lowerBound),
    ]
    for (name, tensor) in behind { inputs["past_" + name] = tensor }
    let given = try graphs.run(GraphName.back, inputs)
    return given.filter { isPart($0.key) }
  }

  private func filled(_ graph: GraphInfo?, _ count: Int) throws -> Tensor {
    try Tensor(graph?.input("filled").dtype ?? .int64, [1], wholes: [count])
  }

  private func cache(_ name: String, entries: Int) throws -> Tensor {
    guard let info = infos[name] else { throw Trouble("no graph has the cache \(name)") }
    return try Tensor(info.dtype, [1, info.shape[1], entries, info.shape[3]])
  }

  /// A cache with room for so many entries, and for some more.
  private func empty(_ name: String, entries: Int) throws -> Tensor {
    let most = (imageEntries[name] ?? 0) + room
    return try cache(name, entries: min((entries + Self.block) / Self.block * Self.block, most))
  }

  func read(_ ids: [Int], behind done: Int) throws -> [Float] {
    var last = try Tensor(.float32, [1, 0])
    for at in stride(from: 0, to: ids.count, by: chunk) {
      let some = Array(ids[at..<min(ids.count, at + chunk)])
      let hidden = try decode(some, behind: done + at)
      last = try hidden.rows(some.count - 1..<some.count)
    }
    return try logits(graphs.run(GraphName.head, ["last_hidden": last]), row: 0)
  }

  /// What the last layer gives, (1, T, D), for at most a chunk.
  private func decode(_ ids: [Int], behind done: Int) throws -> Tensor {
    let embedding = try graphs[GraphName.embedding].info.input("ids")
    let numbers = try Tensor(embedding.dtype, [1, ids.count], wholes: ids)
    let embedded = try graphs.run(GraphName.embedding, ["ids": numbers])
    var hidden = try seenTensor(embedded, "inputs_embeds")
    let at = ids.indices.map { graphs.manifest.firstText + done + $0 }
    for (graph, names) in parts {
      let full = (imageEntries[names[0]] ?? 0) + done
      var inputs = [
        graph.inputs[0].name: hidden,
        "positions": try Tensor(graph.inputs[1].dtype, [1, ids.count], wholes: at),
        "filled": try filled(graph, full),
      ]
      for name in names { inputs["past_" + name] = past[name] }
      let given = try graphs.run(graph.name, inputs)
      for name in names {
        guard let new = given[name], var cache = past[name] else { throw Trouble("\(graph.name) did not give \(name)") }
        if full + ids.count > cache.shape[2] {
          let grown = try empty(name, entries: full + ids.count)
          try grown.write(cache, from: 0..<full, at: 0)
          past[name] = grown
          cache = grown
        }
        try cache.write(new, from: 0..<ids.count, at: full)
      }
      hidden = try seenTensor(given, graph.outputs[0].name)
    }
    return hidden
  }
}

/// Graphs of fixed numbers of tokens; the cache is as large as it can become, or kept by the engine.
private final class StaticTextGraphs: TextGraphs {
  let room: Int
  let chunk: Int
  let cacheBytes: Int
  private let graphs: Graphs
  private let imageEntries: [String: Int]
  private var past: [String: Tensor] = [:]
  private let states: KeptStates?

  init(_ graphs: Graphs) throws {
    self.graphs = graphs
    let vision = try graphs[GraphName.vision].info
    let image = try graphs[GraphName.imagePrefill].info
    let prefill = try graphs[GraphName.textPrefill].info
    let decoder = try graphs[GraphName.textDecoder].info
    let sorted = { (infos: [TensorInfo]) in infos.sorted { $0.name < $1.name } }
    guard sorted(decoder.cache) == sorted(prefill.cache) else {
      throw Trouble("\(graphs.manifest.name): its text graphs have different caches; they come from different exports")
    }
    try checkCache(prefill.cache, of: prefill.name)
    chunk = try tokens(of: prefill.input("inputs_embeds"), prefill.name)
    var entries: [String: Int] = [:]
    for info in vision.outputs + image.outputs where isPart(info.name) && info.shape.count == 4 {
      entries[info.name] = info.shape[2]
    }
    if !prefill.states.isEmpty {
      // These it does not hand out, but writes.
      let kept = try tokens(of: image.input("hidden"), image.name)
      for info in image.states where entries[part(info)] == nil { entries[part(info)] = kept }
    }
    guard Set(entries.keys) == Set(prefill.cache.map(part)) else {
      throw Trouble("\(graphs.manifest.name): its graphs do not fill the cache of \(prefill.name); export again")
    }
    room = try theOnly(Set(prefill.cache.map { $0.shape[2] - (entries[part($0)] ?? 0) }), graphs.manifest)
    imageEntries = entries
    cacheBytes = try prefill.cache.reduce(0) { $0 + (try Tensor.count($1.shape)) * $1.dtype.size }
    if prefill.states.isEmpty {
      states = nil
      for info in prefill.cache { past[part(info)] = try Tensor(info.dtype, info.shape) }
    } else {
      states = try graphs[GraphName.textPrefill].makeStates()
    }
  }

  func see(_ seen: [String: Tensor]) throws {
    let image = try graphs[GraphName.imagePrefill].info
    let taken = try image.inputs.reduce(into: [String: Tensor]()) { $0[$1.name] = try seenTensor(seen, $1.name) }
    let made = try graphs.run(image.name, taken, states: states)
    if states != nil { return }
    for (name, entries) in imageEntries {
      try past[name]?.write(made[name] ?? seenTensor(seen, name), from: 0..<entries, at: 0)
    }
  }

  func read(_ ids: [Int], behind done: Int) throws -> [Float] {
    var at = 0
    var last: [Float] = []
    while at < ids.count {
      if states != nil && ids.count - at > 1 {
        // A chunk is written whole and must fit: the last one may begin earlier and write the same once more.
        at = min(at, room - chunk - done)
        if at < 0 {
          throw Trouble("a chunk of \(chunk) tokens does not fit into the \(room) entries of the text cache")
        }
      }
      let some = Array(ids[at..<min(ids.count, at + chunk)])
      last = try decode(some, behind: done + at)
      at += some.count
    }
    return last
  }

  /// As `read`, for at most a chunk.
  private func decode(_ ids: [Int], behind done: Int) throws -> [Float] {
    let name = ids.count == 1 ? GraphName.textDecoder : GraphName.textPrefill
    let size = ids.count == 1 ? 1 : chunk
    let graph = try graphs[name].info
    let embedding = try graphs[GraphName.embedding].info.input("ids")
    let width = try tokens(of: embedding, GraphName.embedding)
    guard ids.count <= width, size <= width else {
      throw Trouble("\(GraphName.embedding) takes \(width) tokens, \(name) takes \(size)")
    }
    let padded = ids + [Int](repeating: 0, count: width - ids.count)
    let embedded = try graphs.run(
      GraphName.embedding, ["ids": try Tensor(embedding.dtype, [1, width], wholes: padded)])
    // Padding takes the last position there is; what it computes is dropped.
    let positions = (0..<size).map { graphs.manifest.firstText + min(done + $0, room - 1) }
    var inputs = [
      "inputs_embeds": try seenTensor(embedded, "inputs_embeds").rows(0..<size),
      "positions": try Tensor(graph.input("positions").dtype, [1, size], wholes: positions),
    ]
    for (name, tensor) in past { inputs["past_" + name] = tensor }
    let given = try graphs.run(name, inputs, states: states)
    if states == nil {
      for (name, entries) in imageEntries {
        try past[name]?.write(seenTensor(given, name), from: 0..<ids.count, at: entries + done)
      }
    }
    return try logits(given, row: ids.count - 1)
  }
}
