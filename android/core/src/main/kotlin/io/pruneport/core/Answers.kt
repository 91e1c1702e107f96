// Answers about a photo: the image is prefilled when it arrives, and a question costs only its own tokens.

package io.pruneport.core

/** Milliseconds of one photo and one question. */
data class AnswerTimes(
    val vision: Double = 0.0,
    val imagePrefill: Double = 0.0,
    val imageReady: Double = 0.0,
    val questionPrefill: Double = 0.0,
    val ttftQuestion: Double = 0.0,
    val tokens: List<Double> = emptyList(),
)

fun millisecondsSince(start: Long): Double = (System.nanoTime() - start) / 1e6

/**
 * Answers questions with the open graphs of one bundle, one at a time: it keeps the cache that it writes into.
 *
 * Throws Trouble where graphs are missing or do not belong together.
 */
class Answers(private val graphs: Graphs) {
    private val stated =
        graphs.manifest.text ?: throw Trouble("${graphs.manifest.name} has no text graphs to answer with")
    private val text: TextGraphs = if (graphs.has(GraphName.BACK)) OpenTextGraphs(graphs) else StaticTextGraphs(graphs)
    private var hasSeen = false

    var times = AnswerTimes()
        private set

    /** Positions of the image tokens of the last photo that were kept, by the unpruned image; null where unknown. */
    var kept: List<Int>? = null
        private set

    /** How many text tokens fit into the cache, and how many are read at a time. */
    val room: Int get() = text.room
    val chunk: Int get() = text.chunk

    /** Bytes of the KV cache, image and text, once it is full. */
    val cacheBytes: Long get() = text.cacheBytes

    init {
        if (text.room != stated.tokens || text.chunk != stated.chunk) {
            throw Trouble(
                "the manifest of ${graphs.manifest.name} says ${stated.tokens} text tokens in chunks of " +
                    "${stated.chunk}, its graphs have room for ${text.room} in chunks of ${text.chunk}; export again",
            )
        }
    }

    /** Prefills a photo, pixel values (1, 3, H, W). Throws Trouble. */
    fun see(pixelValues: Tensor) {
        hasSeen = false
        times = AnswerTimes()
        val start = System.nanoTime()
        val seen = graphs.run(GraphName.VISION, mapOf("pixel_values" to pixelValues))
        val vision = millisecondsSince(start)
        val behind = System.nanoTime()
        text.see(seen)
        times = AnswerTimes(vision, millisecondsSince(behind), millisecondsSince(start))
        kept = keptTokens(seen)
        hasSeen = true
    }

    private fun keptTokens(seen: Map<String, Tensor>): List<Int>? {
        val before = graphs.manifest.before
        val positions = seen["positions"] ?: return null
        return positions.wholes().drop(before).map { it - before }
            .filter { it in 0 until graphs.manifest.prune.imageTokens }.map { it.toInt() }
    }

    /**
     * Answers about the photo that was seen last; [say] gets each token and stops the answer by giving false.
     *
     * The token that ends the answer is left out; [pastEnd] goes on as if there were none. Everything is refused before
     * anything runs. Throws Trouble.
     */
    fun answer(
        question: List<Int>,
        newTokens: Int,
        sampling: Sampling = Sampling(),
        pastEnd: Boolean = false,
        say: (Int) -> Boolean = { true },
    ): List<Int> {
        if (!hasSeen) throw Trouble("no photo has been seen; show one first")
        if (question.isEmpty()) throw Trouble("the question is empty; ask something")
        // The last token is handed out without being decoded.
        if (newTokens < 1 || question.size.toLong() + newTokens - 1 > room) {
            throw Trouble(
                "a question of ${question.size} tokens and $newTokens new ones do not fit into the $room entries of " +
                    "the text cache; ask shorter, for fewer tokens, or export with more --text-tokens",
            )
        }
        times = times.copy(questionPrefill = 0.0, ttftQuestion = 0.0, tokens = emptyList())
        var start = System.nanoTime()
        var logits = text.read(question, 0)
        times = times.copy(questionPrefill = millisecondsSince(start))
        val ids = ArrayList<Int>()
        while (true) {
            val token = sampling.choose(logits)
            val spent = millisecondsSince(start)
            times = if (ids.isEmpty()) times.copy(ttftQuestion = spent) else times.copy(tokens = times.tokens + spent)
            if (!pastEnd && token in stated.endIds) return ids
            ids += token
            if (!say(token) || ids.size == newTokens) return ids
            start = System.nanoTime()
            logits = text.read(listOf(token), question.size + ids.size - 1)
        }
    }
}

/** A set of text graphs with the cache that they work on. */
private interface TextGraphs {
    val room: Int
    val chunk: Int
    val cacheBytes: Long

    /** Fills the cache from what the vision graph gave. */
    fun see(seen: Map<String, Tensor>)

    /** Logits (V,) behind [ids], whose entries go into the cache behind so many text tokens. */
    fun read(ids: List<Int>, done: Int): FloatArray
}

private fun isPart(name: String) = name.startsWith("key_") || name.startsWith("value_")

/** `key_3` of `past_key_3`. */
private fun part(info: TensorInfo) = info.name.removePrefix("past_")

/** Throws Trouble for a cache that is not (1, H, n, d). */
private fun checkCache(infos: List<TensorInfo>, graph: String) {
    if (infos.isEmpty()) throw Trouble("$graph has no cache")
    for (info in infos) {
        if (info.shape.size != 4 || info.shape[0] != 1) {
            throw Trouble("$graph: ${info.name} is ${info.shape}, no cache of four axes")
        }
    }
}

/** The number of text tokens that every layer has room for. */
private fun theOnly(rooms: Set<Int>, manifest: Manifest): Int {
    val room = rooms.singleOrNull()
    if (room == null || room < 1) {
        throw Trouble(
            "${manifest.name}: the layers have room for different numbers of text tokens, ${rooms.sorted()}; " +
                "export again",
        )
    }
    return room
}

private fun Map<String, Tensor>.handed(name: String): Tensor =
    this[name] ?: throw Trouble("a graph does not hand on $name")

/** The [row]-th of the logits (1, T, V). */
private fun logitsOf(given: Map<String, Tensor>, row: Int): FloatArray {
    val tensor = given["logits"]
    if (tensor == null || tensor.shape.size != 3) throw Trouble("the graph gave no logits (1, T, V)")
    return tensor.rows(row, row + 1).floats()
}

/** The first axis behind the batch of an input or output, its number of tokens. */
private fun tokensOf(info: TensorInfo, graph: String): Int {
    if (info.shape.size < 2 || info.shape[0] != 1) throw Trouble("$graph: ${info.name} is ${info.shape}")
    return info.shape[1]
}

private fun wholes(info: TensorInfo, numbers: List<Int>): Tensor =
    Tensor.ofWholes(
        info.dtype,
        if (info.shape.size == 1) listOf(numbers.size) else listOf(1, numbers.size),
        numbers.map { it.toLong() },
    )

/**
 * Graphs of any number of tokens; the cache holds what is filled, and grows in blocks.
 *
 * What stands before the image is the same for every photo: it is run once, and its entries are kept.
 */
private class OpenTextGraphs(private val graphs: Graphs) : TextGraphs {
    private class Part(val graph: GraphInfo, val names: List<String>)

    private val parts: List<Part>
    private val infos = LinkedHashMap<String, TensorInfo>()
    private val imageEntries: Map<String, Int>
    private val past = HashMap<String, Tensor>()
    private var prefix: Map<String, Tensor>? = null
    override val room: Int
    override val chunk: Int
    override val cacheBytes: Long

    init {
        val manifest = graphs.manifest
        val vision = graphs[GraphName.VISION].info
        val kept = tokensOf(vision.output("hidden"), vision.name)
        chunk = tokensOf(graphs[GraphName.EMBEDDING].info.input("ids"), GraphName.EMBEDDING)
        graphs[GraphName.HEAD]
        parts =
            listOf(GraphName.FRONT, GraphName.BACK).filter { graphs.has(it) }.map { name ->
                val graph = graphs[name].info
                checkCache(graph.cache, name)
                if (graph.inputs.size < 2 || graph.inputs[1].name != "positions" || graph.states.isNotEmpty()) {
                    throw Trouble("$name takes not what an open graph takes")
                }
                graph.cache.associateByTo(infos, ::part)
                Part(graph, graph.cache.map(::part))
            }
        val seen = vision.outputs.filter { isPart(it.name) && it.shape.size == 4 }.associate { it.name to it.shape[2] }
        val made = seen.keys + parts.last().graph.outputs.map { it.name }.filter(::isPart)
        if (infos.keys != made) {
            throw Trouble("${manifest.name}: the graphs do not fill the cache of the layers; export again")
        }
        imageEntries = infos.keys.associateWith { seen[it] ?: kept }
        val rooms =
            parts.map { part -> part.names.map { infos.getValue(it).shape[2] - imageEntries.getValue(it) }.toSet() }
        // Those in front of the cut hold every image token, so that their room is the text's; those behind it have room
        // for the largest keep.
        room = theOnly(rooms.first(), manifest)
        if (room > theOnly(rooms.last(), manifest)) {
            throw Trouble("${manifest.name}: the layers behind the cut have less room than those before it")
        }
        cacheBytes =
            infos.entries.sumOf { (name, info) ->
                info.shape[1].toLong() * (imageEntries.getValue(name) + room) * info.shape[3] * info.dtype.size
            }
    }

    override fun see(seen: Map<String, Tensor>) {
        val start = graphs.manifest.before
        val hidden = seen.handed("hidden")
        val fixed = prefix ?: beforeImage(seen, start).also { prefix = it }
        if (start >= hidden.shape[1]) throw Trouble("the vision graph hands on no image token")
        val made = image(seen, start, hidden.shape[1], fixed)
        for ((name, entries) in imageEntries) {
            val whole = empty(name, entries)
            val new = made[name]
            if (new == null) {
                whole.write(seen.handed(name), 0, entries, 0)
            } else {
                if (entries <= start) throw Trouble("the vision graph hands on fewer entries of $name than tokens")
                if (start > 0) whole.write(fixed.handed(name), 0, start, 0)
                whole.write(new, 0, entries - start, start)
            }
            past[name] = whole
        }
    }

    /** Entries of what stands before the image; where there is nothing, one that does not count. */
    private fun beforeImage(seen: Map<String, Tensor>, count: Int): Map<String, Tensor> {
        val nothing = parts.last().names.associateWith { cache(it, 1) }
        return if (count == 0) nothing else image(seen, 0, count, nothing).mapValues { it.value.entries(0, count) }
    }

    /** Keys and values of the layers behind the cut, of some of the tokens that the vision graph handed on. */
    private fun image(seen: Map<String, Tensor>, from: Int, to: Int, behind: Map<String, Tensor>): Map<String, Tensor> {
        val back = parts.last().graph
        val inputs =
            hashMapOf(
                "hidden" to seen.handed("hidden").rows(from, to),
                "positions" to seen.handed("positions").rows(from, to),
                "filled" to wholes(back.input("filled"), listOf(from)),
            )
        for ((name, tensor) in behind) inputs["past_$name"] = tensor
        return graphs.run(back.name, inputs).filterKeys(::isPart)
    }

    private fun cache(name: String, entries: Int): Tensor {
        val info = infos.getValue(name)
        return Tensor(info.dtype, listOf(1, info.shape[1], entries, info.shape[3]))
    }

    /** A cache with room for so many entries, and for some more. */
    private fun empty(name: String, entries: Int): Tensor =
        cache(name, minOf((entries + BLOCK) / BLOCK * BLOCK, imageEntries.getValue(name) + room))

    override fun read(ids: List<Int>, done: Int): FloatArray {
        var last: Tensor? = null
        for (at in ids.indices step chunk) {
            val some = ids.subList(at, minOf(ids.size, at + chunk))
            last = decode(some, done + at).rows(some.size - 1, some.size)
        }
        return logitsOf(graphs.run(GraphName.HEAD, mapOf("last_hidden" to checkNotNull(last))), 0)
    }

    /** What the last layer gives, (1, T, D), for at most a chunk. */
    private fun decode(ids: List<Int>, done: Int): Tensor {
        val numbers = wholes(graphs[GraphName.EMBEDDING].info.input("ids"), ids)
        var hidden = graphs.run(GraphName.EMBEDDING, mapOf("ids" to numbers)).handed("inputs_embeds")
        val places = ids.indices.map { graphs.manifest.firstText + done + it }
        for (part in parts) {
            val graph = part.graph
            val full = imageEntries.getValue(part.names[0]) + done
            val inputs =
                hashMapOf(
                    graph.inputs[0].name to hidden,
                    "positions" to wholes(graph.inputs[1], places),
                    "filled" to wholes(graph.input("filled"), listOf(full)),
                )
            for (name in part.names) inputs["past_$name"] = past.handed(name)
            val given = graphs.run(graph.name, inputs)
            for (name in part.names) {
                var cache = past.handed(name)
                if (full + ids.size > cache.shape[2]) {
                    val grown = empty(name, full + ids.size)
                    grown.write(cache, 0, full, 0)
                    past[name] = grown
                    cache = grown
                }
                cache.write(given.handed(name), 0, ids.size, full)
            }
            hidden = given.handed(graph.outputs[0].name)
        }
        return hidden
    }

    companion object {
        /** Engines plan their memory anew for every new length, so that the cache grows by so many entries. */
        const val BLOCK = 64
    }
}

/** Graphs of fixed numbers of tokens; the cache is as large as it can become. */
private class StaticTextGraphs(private val graphs: Graphs) : TextGraphs {
    private val imageEntries: Map<String, Int>
    private val past: Map<String, Tensor>
    override val room: Int
    override val chunk: Int
    override val cacheBytes: Long

    init {
        val manifest = graphs.manifest
        val vision = graphs[GraphName.VISION].info
        val image = graphs[GraphName.IMAGE_PREFILL].info
        val prefill = graphs[GraphName.TEXT_PREFILL].info
        val decoder = graphs[GraphName.TEXT_DECODER].info
        if ((image.states + prefill.states + decoder.states).isNotEmpty()) {
            throw Trouble("${manifest.name} keeps its cache in states, which no engine here does", missing = true)
        }
        if (decoder.cache.toSet() != prefill.cache.toSet()) {
            throw Trouble("${manifest.name}: its text graphs have different caches; they come from different exports")
        }
        checkCache(prefill.cache, prefill.name)
        chunk = tokensOf(prefill.input("inputs_embeds"), prefill.name)
        imageEntries =
            (vision.outputs + image.outputs).filter { isPart(it.name) && it.shape.size == 4 }
                .associate { it.name to it.shape[2] }
        if (imageEntries.keys != prefill.cache.map(::part).toSet()) {
            throw Trouble("${manifest.name}: its graphs do not fill the cache of ${prefill.name}; export again")
        }
        room = theOnly(prefill.cache.map { it.shape[2] - imageEntries.getValue(part(it)) }.toSet(), manifest)
        cacheBytes = prefill.cache.sumOf { Tensor.count(it.shape) * it.dtype.size }
        past = prefill.cache.associate { part(it) to Tensor(it.dtype, it.shape) }
    }

    override fun see(seen: Map<String, Tensor>) {
        val image = graphs[GraphName.IMAGE_PREFILL].info
        val made = graphs.run(image.name, image.inputs.associate { it.name to seen.handed(it.name) })
        for ((name, entries) in imageEntries) {
            past.handed(name).write(made[name] ?: seen.handed(name), 0, entries, 0)
        }
    }

    override fun read(ids: List<Int>, done: Int): FloatArray {
        var last = FloatArray(0)
        for (at in ids.indices step chunk) last = decode(ids.subList(at, minOf(ids.size, at + chunk)), done + at)
        return last
    }

    /** As [read], for at most a chunk. */
    private fun decode(ids: List<Int>, done: Int): FloatArray {
        val name = if (ids.size == 1) GraphName.TEXT_DECODER else GraphName.TEXT_PREFILL
        val size = if (ids.size == 1) 1 else chunk
        val graph = graphs[name].info
        val embedding = graphs[GraphName.EMBEDDING].info.input("ids")
        val width = tokensOf(embedding, GraphName.EMBEDDING)
        if (size > width) throw Trouble("${GraphName.EMBEDDING} takes $width tokens, $name takes $size")
        val padded = ids + List(width - ids.size) { 0 }
        val embedded = graphs.run(GraphName.EMBEDDING, mapOf("ids" to wholes(embedding, padded)))
        // Padding takes the last position there is; what it computes is dropped.
        val places = (0 until size).map { graphs.manifest.firstText + minOf(done + it, room - 1) }
        val inputs =
            hashMapOf(
                "inputs_embeds" to embedded.handed("inputs_embeds").rows(0, size),
                "positions" to wholes(graph.input("positions"), places),
            )
        for ((part, tensor) in past) inputs["past_$part"] = tensor
        val given = graphs.run(name, inputs)
        for ((part, entries) in imageEntries) {
            past.handed(part).write(given.handed(part), 0, ids.size, entries + done)
        }
        return logitsOf(given, ids.size - 1)
    }
}
