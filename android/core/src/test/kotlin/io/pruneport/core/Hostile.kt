// Files that are broken, or made to break the reader: each gives an error in words, none a crash.

package io.pruneport.core

import java.io.File
import java.util.Random

private fun parse(text: String) = Json.parse(text, "x.json")

private const val GRAPH =
    """[{"name": "vision_encoder", "file": "a.pte", "engine": "executorch",
      "inputs": [{"name": "pixel_values", "shape": [1, 3, 2, 2], "dtype": "float32"}],
      "outputs": [{"name": "hidden", "shape": [1, 7, 4], "dtype": "float32"}]}]"""

fun hostile(checks: Checks) {
    json(checks)
    safetensors(checks)
    tensors(checks)
    manifests(checks)
    jobFiles(checks)
    graphs(checks)
    tokenizers(checks)
    bytesToText(checks)
    steps(checks)
    prompts(checks)
    photosAndLogits(checks)
    mutations(checks)
}

private fun json(checks: Checks) {
    for ((text, words) in
        listOf(
            "" to "ends too early", "{" to "lacks a name", "[1," to "ends too early", "[1 2]" to "lacks a comma",
            "{\"a\" 1}" to "lacks a colon", "{\"a\": 1,}" to "lacks a name", "nul" to "is no JSON",
            "NaN" to "is no JSON",
            "Infinity" to "is no JSON", "-" to "is no JSON", "-Infinity" to "is no JSON", "01" to "is no JSON",
            "1." to "without its end", "1e" to "without its end", "1e400" to "beyond all bounds",
            "\"abc" to "without an end", "\"\\q\"" to "unknown escape", "\"\\ud800\"" to "half a character",
            "\"\\ud800\\u0041\"" to "half a character", "\"\\udc00\"" to "half a character",
            "\"\\u12 4\"" to "unknown escape", "\"\\u1" to "without an end", "\"a\nb\"" to "control character",
            "1 1" to "behind its end", "{\"a\": 1, \"a\": 2}" to "twice", "[".repeat(100_000) to "too deeply",
            "{\"a\":".repeat(100_000) to "too deeply",
        )) {
        checks.check("json ${text.take(20)}") { assertTrouble(words) { parse(text) } }
    }
    checks.check("json not UTF-8") {
        for (bytes in listOf(listOf(0xC3, 0x28), listOf(0xED, 0xA0, 0x80), listOf(0xC0, 0x80), listOf(0xFF))) {
            val text = listOf(0x22) + bytes + 0x22
            assertTrouble("not UTF-8") { Json.parse(ByteArray(text.size) { text[it].toByte() }, "x.json") }
        }
    }
    checks.check("json that is sound") {
        assertEqual(parse("\"\\ud83d\\ude42\\u0000\""), Json.Text("🙂\u0000"))
        val values = listOf(Json.Whole(1), Json.Real(-25.0), Json.Flag(true), Json.Null)
        assertEqual(parse(" [1, -2.5e1, true, null] "), Json.Items(values))
        assertEqual(parse("99999999999999999999"), Json.Real(1e20))
        assertEqual((parse("{\"\\u00c5\": 1, \"\\u212b\": 2}") as Json.Members).values.size, 2)
    }
    checks.check("json that is written is read") {
        val made =
            Json.of(
                "a\"\\\n\u0001" to Json.Items(listOf(Json.Real(1.5e-9), Json.Whole(Long.MIN_VALUE), Json.Real(1e300))),
                "b" to Json.Items(listOf(Json.of(), Json.Items(emptyList()), Json.Null, Json.Text("🙂"))),
            )
        assertEqual(parse(made.written()), made)
        assertEqual(parse(made.compact()), made)
        assertTrouble("cannot be written") { Json.Real(Double.NaN).written() }
        assertTrouble("cannot be written") { Json.numbers(listOf(Double.POSITIVE_INFINITY)).written() }
        assertEqual(parse(Json.Text("a\uD800b").compact()), Json.Text("a\uFFFDb"))
    }
    checks.check("files of json") {
        withFolder { folder ->
            val file = File(folder, "large.json")
            file.writeText(" ".repeat(1001))
            assertTrouble("more than 1000 bytes") { Json.read(file, 1000) }
            assertTrouble("cannot be read") { Json.read(File(folder, "none.json"), 1000) }
            assertTrouble("cannot be read") { Json.read(folder, 1000) }
        }
    }
}

private fun stored(header: String, data: Int = 16, length: Long? = null): Map<String, Tensor> {
    var read: Map<String, Tensor> = emptyMap()
    withFolder { folder ->
        val stated = length ?: header.length.toLong()
        val file = File(folder, "x.safetensors")
        file.writeBytes(
            ByteArray(8) { (stated shr (8 * it)).toByte() } + header.toByteArray() + ByteArray(data) { 1 },
        )
        read = Safetensors.read(file)
    }
    return read
}

private fun tensor(shape: String, offsets: String, dtype: String = "U8") =
    stored("{\"a\": {\"dtype\": \"$dtype\", \"shape\": $shape, \"data_offsets\": $offsets}}")

private fun safetensors(checks: Checks) {
    checks.check("safetensors that are sound") {
        assertEqual(tensor("[4]", "[0, 4]").getValue("a").wholes().toList(), listOf(1L, 1L, 1L, 1L))
        assertEqual(tensor("[0]", "[4, 4]").getValue("a").count, 0)
    }
    for ((given, words) in
        listOf(
            ("[4]" to "[14, 18]") to "lies outside", ("[4]" to "[4, 0]") to "lies outside",
            ("[4]" to "[0]") to "lies outside", ("[4]" to "[-4, 0]") to "not in",
            ("[4]" to "[0, 9223372036854775807]") to "lies outside",
            ("[4]" to "[0, 9223372036854775808]") to "no whole number", ("[5]" to "[0, 4]") to "not as many bytes",
            ("[-1]" to "[0, 4]") to "not in",
            ("[2147483647, 2147483647, 2147483647]" to "[0, 4]") to "cannot have the shape",
            ("\"4\"" to "[0, 4]") to "is no list", ("[1.5]" to "[0, 4]") to "no whole number",
        )) {
        checks.check("safetensors $given") { assertTrouble(words) { tensor(given.first, given.second) } }
    }
    checks.check("safetensors headers") {
        assertTrouble("not exchanged") { tensor("[2]", "[0, 4]", "BF16") }
        assertTrouble("has a header of") { stored("{}", data = 17 shl 20, length = 17L shl 20) }
        assertTrouble("truncated") { stored("{}", length = 1000) }
        assertTrouble("truncated") { stored("{}", length = -1) }
        assertTrouble("no header") { stored("[]") }
        assertTrouble("is no object") { stored("{\"a\": 1}") }
        assertTrouble("is missing") { stored("{\"a\": {}}") }
        withFolder { folder ->
            val file = File(folder, "short.safetensors")
            for (count in listOf(0, 7)) {
                file.writeBytes(ByteArray(count))
                assertTrouble("no safetensors file") { Safetensors.read(file) }
            }
            assertTrouble("no plain file") { Safetensors.read(folder) }
        }
    }
    checks.check("safetensors that are written are read") {
        withFolder { folder ->
            val file = File(folder, "x.safetensors")
            val given =
                mapOf(
                    "flags" to Tensor(DType.BOOL, listOf(3)),
                    "positions" to Tensor.ofWholes(DType.INT64, listOf(1, 2), listOf(-7L, 1L shl 40)),
                    "hidden" to Tensor.ofFloats(listOf(1, 3), floatArrayOf(1.5f, -0.0f, Float.POSITIVE_INFINITY)),
                    "none" to Tensor(DType.INT32, listOf(0, 4)),
                )
            Safetensors.write(given, file)
            val read = Safetensors.read(file)
            assertEqual(read.keys, given.keys)
            for ((name, tensor) in given) {
                val got = read.getValue(name)
                assertEqual(got.dtype to got.shape, tensor.dtype to tensor.shape)
                assertEqual(got.toByteArray().toList(), tensor.toByteArray().toList())
            }
        }
    }
}

private fun tensors(checks: Checks) {
    checks.check("tensors refuse what does not fit") {
        val cache = Tensor(DType.FLOAT32, listOf(1, 2, 5, 3))
        val four = Tensor(DType.FLOAT32, listOf(1, 2, 4, 3))
        assertTrouble("do not go into") { cache.write(four, 0, 4, 2) }
        assertTrouble("do not go into") { cache.write(four, 0, 5, 0) }
        assertTrouble("do not go into") { cache.write(four, -1, 2, 0) }
        assertTrouble("do not go into") { cache.write(four, 0, 2, -1) }
        assertTrouble("do not go into") { cache.write(Tensor(DType.FLOAT16, four.shape), 0, 4, 0) }
        assertTrouble("do not go into") { cache.write(Tensor(DType.FLOAT32, listOf(1, 2, 4, 2)), 0, 4, 0) }
        assertTrouble("has no rows") { Tensor(DType.FLOAT32, listOf(1, 2)).rows(1, 3) }
        assertTrouble("cannot have the shape") { Tensor(DType.FLOAT32, listOf(-1)) }
        assertTrouble("cannot have the shape") { Tensor(DType.INT8, listOf(Int.MAX_VALUE, Int.MAX_VALUE)) }
        assertTrouble("no memory") { Tensor(DType.INT8, listOf(1 shl 20, 1 shl 19)) }
        assertTrouble("do not fill") { Tensor.ofFloats(listOf(2), floatArrayOf(1f)) }
        assertTrouble("do not fill") { Tensor.ofBytes(DType.INT8, listOf(2), ByteArray(3)) }
        assertTrouble("no int32") { Tensor.ofWholes(DType.INT32, listOf(1), listOf(1L shl 40)) }
        assertTrouble("no whole number") { Tensor.ofFloats(listOf(1), floatArrayOf(Float.NaN)).wholes() }
        assertTrouble("floating-point") { Tensor(DType.INT8, listOf(1)).floats() }
    }
    checks.check("memory that is not there") {
        val before = Tensor.memory
        try {
            Tensor.memory = { throw OutOfMemoryError("full") }
            assertTrouble("no memory for a tensor of 8 bytes") { Tensor(DType.INT64, listOf(1)) }
            Tensor.memory = { java.nio.ByteBuffer.allocateDirect(it) }
            assertEqual(Tensor.ofWholes(DType.INT64, listOf(1), listOf(258L)).bytes.get(0), 2.toByte())
        } finally {
            Tensor.memory = before
        }
    }
    checks.check("parts of tensors") {
        val all = Tensor.ofFloats(listOf(1, 4, 2), FloatArray(8) { it.toFloat() })
        assertEqual(all.rows(1, 3).floats().toList(), listOf(2f, 3f, 4f, 5f))
        assertEqual(all.rows(1, 3).shape, listOf(1, 2, 2))
        assertEqual(all.rows(2, 4).rows(1, 2).floats().toList(), listOf(6f, 7f))
        val cache = Tensor.ofFloats(listOf(1, 2, 3, 1), FloatArray(6) { it.toFloat() })
        assertEqual(cache.entries(1, 3).floats().toList(), listOf(1f, 2f, 4f, 5f))
        val copy = cache.copy()
        cache.bytes.putFloat(0, 9f)
        assertEqual(copy.floats()[0], 0f)
    }
    checks.check("halves") {
        val halves = Tensor(DType.FLOAT16, listOf(6))
        for ((at, bits) in listOf(0x3C00, 0xC000, 0x0001, 0x7BFF, 0x8000, 0x7C00).withIndex()) {
            halves.bytes.putShort(at * 2, bits.toShort())
        }
        val small = 1f / (1 shl 24)
        assertEqual(halves.floats().toList(), listOf(1f, -2f, small, 65504f, -0.0f, Float.POSITIVE_INFINITY))
    }
}

private fun manifest(graphs: String, field: String = "", value: String = "null"): Manifest {
    val json = exampleManifest(parse(graphs))
    return Manifest.of(if (field == "") json else Json.Members(json.values + (field to parse(value))))
}

private fun manifests(checks: Checks) {
    checks.check("a manifest that is sound") {
        assertEqual(manifest(GRAPH).graph("vision_encoder")?.file, "a.pte")
        withFolder { assertTrouble("does not list a.pte") { manifest(GRAPH).checkFiles(it) } }
        val listed = manifest(GRAPH, "files", "{\"a.pte\": {\"sha256\": \"\", \"size_bytes\": 3}}")
        withFolder { folder ->
            assertTrouble("a.pte is missing") { listed.checkFiles(folder) }
            File(folder, "a.pte").writeText("ab")
            assertTrouble("has 2 bytes, not 3") { listed.checkFiles(folder) }
            File(folder, "a.pte").writeText("abc")
            listed.checkFiles(folder)
        }
    }
    for ((change, words) in
        listOf(
            ("a.pte" to "../a.pte") to "no plain path", ("a.pte" to "/a.pte") to "no plain path",
            ("a.pte" to "a//b") to "no plain path", ("float32" to "bfloat16") to "not exchanged",
            ("[1, 7, 4]" to "[1, 0, 4]") to "not in",
            ("[1, 7, 4]" to "[1048576, 1048576, 4]") to "cannot have the shape",
            ("\"name\": \"hidden\", " to "") to "is missing",
        )) {
        checks.check("manifest with $change") {
            assertTrouble(words) { manifest(GRAPH.replace(change.first, change.second)) }
        }
    }
    for ((field, value, words) in
        listOf(
            Triple("schema_version", "3", "use app and bundle of one release"),
            Triple("schema_version", "null", "is missing"),
            Triple("prune", "{\"cut\": 1, \"image_tokens\": 10, \"keep\": 11, \"grid\": [2, 5]}", "not in"),
            Triple("prune", "{\"cut\": 1, \"image_tokens\": 10, \"keep\": 4, \"grid\": [65536, 65536]}", "not hold"),
            Triple("image", "{\"tiles\": {\"resize\": [2, 2], \"grid\": [1, 1]}}", "in tiles, which this app cannot cut"),
            Triple("graphs", "[]", "no graphs"), Triple("frame", "[]", "no object"), Triple("name", "1", "is no text"),
            Triple("text", "{\"tokens\": 1e3, \"chunk\": 8}", "no whole number"),
            Triple("files", "{\"../a\": {\"size_bytes\": 1}}", "no plain path"),
        )) {
        checks.check("manifest with $field $value") { assertTrouble(words) { manifest(GRAPH, field, value) } }
    }
    checks.check("several keeps") {
        fun keep(count: Int, name: String) =
            "{\"prune\": {\"cut\": 1, \"image_tokens\": 10, \"keep\": $count, \"grid\": [2, 5]}, \"graph\": \"$name\"}"
        val graph = GRAPH.removePrefix("[").removeSuffix("]")
        val both = listOf("v4", "v8").joinToString(",", "[", "]") { graph.replace("vision_encoder", it) }
        val json = exampleManifest(parse(both))
        val whole = Json.Members(json.values + ("keeps" to parse("[${keep(4, "v4")}, ${keep(8, "v8")}]")))
        assertEqual(Manifest.of(whole).keeps, listOf(4, 8))
        for (chosen in listOf(Choice.Keep(8), Choice.Vision("v8")).map { Manifest.of(whole, it) }) {
            assertEqual(chosen.prune.keep, 8)
            assertEqual(chosen.graphs.map { it.name to it.stored }, listOf("vision_encoder" to "v8"))
            assertTrue(chosen.graphs[0].sharesFile, "the file is shared")
        }
        assertTrouble("has the keeps 4, 8") { Manifest.of(whole, Choice.Keep(5)) }
    }
}

private fun jobFiles(checks: Checks) {
    val least = "{\"id\": \"0123456789abcdef\", \"bundle\": \"b\", \"vision\": \"v\", \"steps\": []}"
    checks.check("a job that is sound") { assertEqual(JobFile.of(parse(least)).vision, "v") }
    checks.check("a job with another id") {
        assertTrouble("16 lower-case") { JobFile.of(parse(least.replace("abcdef", "ABCDEF"))) }
        assertTrouble("is no list") { JobFile.of(parse(least.replace("[]", "1"))) }
    }
    for ((more, words) in
        listOf(
            "\"x\": 1" to "unknown field", "\"threads\": 257" to "not in", "\"folder\": \"../x\"" to "is not bundle",
            "\"job_version\": 2" to "of one release",
            "\"answer\": {\"question\": [], \"new_tokens\": 1}" to "is empty",
            "\"answer\": {\"question\": [1], \"new_tokens\": 0}" to "not in",
            "\"answer\": {\"question\": [-1], \"new_tokens\": 1}" to "not in",
            "\"gate\": {\"most_celsius\": 0}" to "not in",
            "\"twin\": {\"bundle\": \"t\", \"folder\": \"..\", \"vision\": \"v\"}" to "is not twin",
        )) {
        checks.check("a job with $more") {
            assertTrouble(words) { JobFile.of(parse(least.replace("[]", "[], $more"))) }
        }
    }
}

private fun graphs(checks: Checks) {
    class Wrong(override val info: GraphInfo, private val given: Map<String, Tensor>) : GraphRunner {
        override val loadMs = 0.0

        override fun run(inputs: Map<String, Tensor>) = given
    }
    checks.check("tensors of the wrong shape") {
        val sound = manifest(GRAPH)
        val pixels = mapOf("pixel_values" to Tensor(DType.FLOAT32, listOf(1, 3, 2, 2)))

        fun run(given: Map<String, Tensor>, taken: Map<String, Tensor> = pixels) {
            Graphs(sound, listOf(Wrong(sound.graphs[0], given))).run("vision_encoder", taken)
        }
        val hidden = "hidden" to Tensor(DType.FLOAT32, listOf(1, 7, 4))
        run(mapOf(hidden))
        assertTrouble("was not given pixel_values") { run(mapOf(hidden), emptyMap()) }
        assertTrouble("did not give hidden") { run(emptyMap()) }
        assertTrouble("not float32 [1, 6, 4]") { run(mapOf("hidden" to Tensor(DType.FLOAT32, listOf(1, 6, 4)))) }
        assertTrouble("not float16") { run(mapOf("hidden" to Tensor(DType.FLOAT16, listOf(1, 7, 4)))) }
        assertTrouble("not float32 [1, 3, 2]") {
            run(mapOf(hidden), mapOf("pixel_values" to Tensor(DType.FLOAT32, listOf(1, 3, 2))))
        }
        assertTrouble("has no lm_head") { Graphs(sound, emptyList()).run("lm_head", emptyMap()) }
        assertTrouble("which this app does not have") { engineFor(sound.graphs[0], emptyList()) }
        assertTrouble("has no ") { Answers(Graphs(sound, listOf(Wrong(sound.graphs[0], emptyMap())))) }
    }
}

private fun tokenizer(extra: String, model: String = "\"vocab\": {\"a\": 0}, \"merges\": []") =
    Tokenizer.of(parse("{\"model\": {$model}${if (extra == "") "" else ", $extra"}}"))

private fun split(regex: String) =
    "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"$regex\"}, \"behavior\": \"Isolated\"}"

private fun tokenizers(checks: Checks) {
    for ((extra, words) in
        listOf(
            "\"normalizer\": {\"type\": \"Lowercase\"}" to "kind Lowercase",
            "\"pre_tokenizer\": {\"type\": \"BertPreTokenizer\"}" to "kind BertPreTokenizer",
            "\"decoder\": {\"type\": \"WordPiece\"}" to "kind WordPiece",
            "\"pre_tokenizer\": ${split("(")}" to "cannot be read",
            "\"pre_tokenizer\": ${split("\\\\h")}" to "cannot be read",
            "\"pre_tokenizer\": ${split("a\\\\")}" to "cannot be read",
            "\"added_tokens\": [{\"id\": 1, \"content\": \"\"}]" to "is empty",
            "\"added_tokens\": [{\"id\": 1, \"content\": \"x\", \"single_word\": true}]" to "single word",
        )) {
        checks.check("tokenizer with $extra") { assertTrouble(words) { tokenizer(extra) } }
    }
    for ((model, words) in
        listOf(
            "\"type\": \"Unigram\", \"vocab\": []" to "kind Unigram",
            "\"vocab\": {\"a\": -1}, \"merges\": []" to "no id",
            "\"vocab\": {\"a\": 0}, \"merges\": [[\"a\", \"b\"]]" to "vocabulary lacks",
            "\"vocab\": {\"a\": 0}, \"merges\": [\"a\"]" to "no pair",
            "\"vocab\": {}, \"merges\": [], \"unk_token\": \"x\"" to "unk_token",
            "\"vocab\": {}, \"merges\": [], \"end_of_word_suffix\": \"x\"" to "end_of_word_suffix",
        )) {
        checks.check("tokenizer of $model") { assertTrouble(words) { tokenizer("", model) } }
    }
    checks.check("tokenizers that are sound") {
        assertEqual(tokenizer("").encode("aba"), listOf(0, 0))
        // Ids that no token has spoil nothing.
        assertEqual(tokenizer("").decode(listOf(5, 0, -1, Int.MAX_VALUE)), "a")
        // Two ways to write one letter are two tokens.
        val letters = "\"vocab\": {\"\\u00c5\": 0, \"\\u212b\": 1}, \"merges\": []"
        assertEqual(tokenizer("", letters).encode("\u00C5\u212B"), listOf(0, 1))
        // Whatever bytes come, text comes of them.
        val bytes = "\"vocab\": {\"\u00C3\": 0, \"\u00A9\": 1}, \"merges\": []"
        assertEqual(tokenizer("\"decoder\": {\"type\": \"ByteLevel\"}", bytes).decode(listOf(0, 1, 0)), "é\uFFFD")
        val stripping =
            "\"added_tokens\": [{\"id\": 1, \"content\": \"<m>\", \"lstrip\": true, \"rstrip\": true}, " +
                "{\"id\": 2, \"content\": \"<m>x\"}]"
        assertEqual(tokenizer(stripping).encode("a \t<m> \na<m>x"), listOf(0, 1, 0, 2))
    }
}

/** What other systems' decoders, and Rust's, make of bytes that are no text. */
private fun bytesToText(checks: Checks) {
    for ((bytes, text) in
        listOf(
            listOf(0xED, 0xA0, 0x80) to "\uFFFD\uFFFD\uFFFD", listOf(0xF0, 0x9F, 0x99, 0x41) to "\uFFFDA",
            listOf(0xF0, 0x80, 0x80) to "\uFFFD\uFFFD\uFFFD", listOf(0xC3, 0x28) to "\uFFFD(",
            listOf(0xE2, 0x82) to "\uFFFD", listOf(0xF5, 0xC0, 0x80) to "\uFFFD\uFFFD\uFFFD",
            listOf(0xE2, 0x82, 0xE2, 0x82, 0xAC) to "\uFFFD€", listOf(0xF4, 0x90, 0x80) to "\uFFFD\uFFFD\uFFFD",
            listOf(0xF0, 0x9F, 0x99, 0x82, 0xC2) to "🙂\uFFFD", emptyList<Int>() to "",
        )) {
        checks.check("text of $bytes") { assertEqual(textOf(ByteArray(bytes.size) { bytes[it].toByte() }), text) }
    }
    checks.check("a letter some of whose bytes are tokens") {
        val model =
            "\"byte_fallback\": true, \"unk_token\": \"?\", " +
                "\"vocab\": {\"?\": 0, \"<0xC3>\": 1, \"<0xA9>\": 2}, \"merges\": []"
        assertEqual(tokenizer("", model).encode("éè"), listOf(1, 2, 0))
    }
    checks.check("marks of the first token") {
        val model = "\"vocab\": {\"__a_b\": 0}, \"merges\": []"
        for ((scheme, text) in listOf("first" to "ab  a b", "always" to "ab  a b", "never" to "  a b  a b")) {
            val decoder = "{\"type\": \"Metaspace\", \"replacement\": \"_\", \"prepend_scheme\": \"$scheme\"}"
            assertEqual(tokenizer("\"decoder\": $decoder", model).decode(listOf(0, 0)), text)
        }
    }
}

private fun steps(checks: Checks) {
    fun ids(step: String, text: String, vararg pieces: String): List<Int> {
        val vocabulary = pieces.withIndex().joinToString { (id, piece) -> "\"$piece\": $id" }
        val model = "\"ignore_merges\": true, \"vocab\": {$vocabulary}, \"merges\": []"
        return tokenizer("\"pre_tokenizer\": $step", model).encode(text)
    }

    fun split(behaviour: String, more: String = "") =
        "{\"type\": \"Split\", \"pattern\": {\"String\": \"-\"}, \"behavior\": \"$behaviour\"$more}"
    checks.check("ways to split") {
        assertEqual(ids(split("Removed"), "ab--cd", "ab", "cd", "--"), listOf(0, 1))
        assertEqual(ids(split("Isolated"), "ab--cd", "ab", "cd", "-"), listOf(0, 2, 2, 1))
        assertEqual(ids(split("Contiguous"), "ab--cd", "ab", "cd", "--"), listOf(0, 2, 1))
        assertEqual(ids(split("MergedWithPrevious"), "ab--cd", "ab-", "cd", "-"), listOf(0, 2, 1))
        assertEqual(ids(split("MergedWithNext"), "ab--cd", "ab", "-cd", "-"), listOf(0, 2, 1))
        assertEqual(ids(split("Removed", ", \"invert\": true"), "ab--cd", "ab", "cd", "-"), listOf(2, 2))
        val digits = "{\"type\": \"Digits\", \"individual_digits\": true}"
        assertEqual(ids(digits, "ab12", "ab", "1", "2", "12"), listOf(0, 1, 2))
        val metaspace = "{\"type\": \"Metaspace\", \"replacement\": \"_\", \"prepend_scheme\": \"always\"}"
        assertEqual(ids(metaspace, "ab cd", "_ab", "_cd"), listOf(0, 1))
    }
    checks.check("white space is Unicode's") {
        val words =
            "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"[^\\\\s-]+\"}, " +
                "\"behavior\": \"Removed\", \"invert\": true}"
        assertEqual(ids(words, "ab\u00A0cd\u3000é-é", "ab", "cd", "é"), listOf(0, 1, 2, 2))
    }
}

private fun prompts(checks: Checks) {
    val added = "\"added_tokens\": [{\"id\": 9, \"content\": \"<image>\", \"special\": true}]"
    val tokenizer = tokenizer(added, "\"vocab\": {\"a\": 0, \" \": 1}, \"merges\": []")

    fun prompt(info: String) = Prompt(tokenizer, PromptInfo.of(Fields(parse(info), "prompt")))
    checks.check("prompts") {
        val sound = prompt("{\"suffix_text\": \"{question}a\", \"special_ids\": {\"image\": 9}}")
        assertEqual(sound.ids("aa"), listOf(0, 0, 0))
        assertTrouble("has no Jinja") { prompt("{\"suffix_text\": null, \"special_ids\": {\"image\": 9}}") }
        assertTrouble("has no Jinja") { prompt("{\"suffix_text\": \"a\", \"special_ids\": {\"image\": 9}}") }
        assertTrouble("another model") { prompt("{\"suffix_text\": \"{question}\", \"special_ids\": {\"image\": 8}}") }
        assertTrouble("is empty") { sound.ids(" \n\u001C") }
        assertTrouble("a second image") { sound.ids("a<image>a") }
    }
}

private fun photosAndLogits(checks: Checks) {
    checks.check("photos out of bounds") {
        assertTrouble("128 megapixels") { Photo(Int.MAX_VALUE, 2, ByteArray(0)) }
        assertTrouble("128 megapixels") { Photo(0, 2, ByteArray(0)) }
        assertTrouble("three bytes") { Photo(2, 2, ByteArray(1)) }
        assertTrouble("50 times") { Photo(1, 51, ByteArray(153)) }
        assertTrouble("not uint8") { Photo.of(Tensor(DType.FLOAT32, listOf(2, 2, 3))) }
    }
    checks.check("logits from which nothing can be chosen") {
        val greedy = Sampling()
        assertTrouble("not a number") { greedy.choose(floatArrayOf(0f, Float.NaN)) }
        assertTrouble("minus infinity") { greedy.choose(FloatArray(2) { Float.NEGATIVE_INFINITY }) }
        assertTrouble("no logits") { greedy.choose(FloatArray(0)) }
        assertTrouble("temperature") { Sampling(-1.0) }
        assertTrouble("temperature") { Sampling(Double.NaN) }
        assertTrouble("temperature") { Sampling(1.0, 0.0) }
        assertEqual(Sampling(1e-300).choose(floatArrayOf(0f, Float.POSITIVE_INFINITY, 5f)), 1)
    }
}

/** A file with one thing wrong somewhere: bytes changed, left out, doubled, or the rest cut off. */
private fun broken(bytes: ByteArray, random: Random): ByteArray {
    val at = random.nextInt(bytes.size)
    val end = minOf(bytes.size, at + 1 + random.nextInt(8))
    return when (random.nextInt(5)) {
        0 -> bytes.copyOf(at)
        1 -> bytes.copyOf(at) + bytes.copyOfRange(end, bytes.size)
        2 -> bytes.copyOf(end) + bytes.copyOfRange(at, bytes.size)
        3 -> bytes.copyOf(at) + "[{-9e\"\\".substring(random.nextInt(7)).toByteArray() + bytes.copyOfRange(end, bytes.size)
        else -> bytes.clone().also { it[at] = random.nextInt(256).toByte() }
    }
}

/** Every way that a file can break is Trouble, or none: nothing else is thrown. */
private fun mutations(checks: Checks) {
    val random = Random(11)

    fun survives(name: String, sound: ByteArray, read: (ByteArray) -> Unit) =
        checks.check("broken $name") {
            read(sound)
            repeat(3000) {
                val bytes = broken(sound, random)
                try {
                    read(bytes)
                } catch (_: Trouble) {
                    // What it should be.
                } catch (error: Throwable) {
                    throw AssertionError("$error for ${String(bytes, Charsets.ISO_8859_1)}", error)
                }
            }
        }
    val job =
        """{"id": "0123456789abcdef", "bundle": "b", "folder": "bundle", "vision": "v", "threads": 2, "steps": [
        {"graph": "g", "stored": "g", "step": "s"}], "answer": {"question": [1, 2], "new_tokens": 3},
        "timing": {"warmup": 1, "runs": 2, "answers": 3}, "gate": {"most_celsius": 37.5, "wait_s": 6e1}}"""
    survives("job", job.toByteArray()) { JobFile.of(Json.parse(it, "job.json")) }
    survives("manifest", exampleManifest(parse(GRAPH)).written().toByteArray()) {
        Manifest.of(Json.parse(it, "manifest.json"))
    }
    val words =
        """{"added_tokens": [{"id": 3, "content": "<m>", "lstrip": true, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|\\s?\\p{L}+|[^\\s]+"}, "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}]},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "byte_fallback": true, "fuse_unk": true, "unk_token": "a",
        "vocab": {"a": 0, "b": 1, "ab": 2, "<0xC3>": 4}, "merges": [["a", "b"]]}}"""
    survives("tokenizer", words.toByteArray()) {
        val made = Tokenizer.of(Json.parse(it, Tokenizer.FILE))
        made.decode(made.encode("abba<m> it's é 3.1\n") + listOf(4, 5, -1))
    }
    withFolder { folder ->
        val file = File(folder, "x.safetensors")
        Safetensors.write(
            mapOf("a" to Tensor(DType.FLOAT32, listOf(1, 2)), "b" to Tensor(DType.INT8, listOf(3))), file,
        )
        survives("safetensors", file.readBytes()) { bytes ->
            file.writeBytes(bytes)
            for (tensor in Safetensors.read(file).values) tensor.toByteArray()
        }
    }
}
