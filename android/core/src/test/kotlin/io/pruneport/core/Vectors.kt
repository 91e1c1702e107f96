// Holds the core against what runtime/ makes of small inputs: tests/phones/vectors. With the folder of a job and one
// for its findings as arguments, and perhaps those of a bundle and its twin, that job is run instead.

package io.pruneport.core

import java.io.File
import java.util.Base64
import kotlin.system.exitProcess

fun main(arguments: Array<String>) {
    if (arguments.size >= 2) {
        val engines = listOf(SumEngine("executorch"), SumEngine("onnxruntime"))
        JobRun(place(arguments), TestDevice(), engines, "core tests", "1", ::println).run(File(arguments[1]))
        return
    }
    val checks = Checks()
    vectors(checks, File(checkNotNull(System.getProperty("pruneport.vectors")) { "-Dpruneport.vectors is not set" }))
    hostile(checks)
    jobs(checks)
    if (!checks.end()) exitProcess(1)
}

private fun place(arguments: Array<String>): Place {
    val job = File(arguments[0])
    return if (arguments.size < 4) Place(job) else Place(job, File(arguments[2]), File(arguments[3]))
}

private fun cases(folder: File, name: String): List<Json> =
    (Json.read(File(folder, "$name.json"), 64 shl 20) as Json.Items).values

private fun Fields.ids(name: String) = wholes(name, 0..Int.MAX_VALUE)

private fun Fields.doubles(name: String) = numbers(name, -1e30..1e30, list(name).size)

private fun vectors(checks: Checks, folder: File) {
    for ((number, json) in cases(folder, "photos").withIndex()) {
        checks.check("photo $number") { photo(Fields(json, "photos")) }
    }
    for (json in cases(folder, "tokens")) tokens(checks, Fields(json, "tokens"))
    for ((number, json) in cases(folder, "walks").withIndex()) {
        checks.check("walk $number") { walk(Fields(json, "walks")) }
    }
    for ((number, json) in cases(folder, "samplings").withIndex()) {
        checks.check("sampling $number") { sampling(Fields(json, "samplings")) }
    }
    checks.check("jobs") {
        val (least, whole) = cases(folder, "jobs").map(JobFile::of)
        assertEqual(whole.steps.map { it.stored }, listOf("vision_encoder_keep64"))
        assertEqual(whole.answer, AnswerJob(listOf(5, 6, 7), 4))
        assertEqual(whole.timing, TimingJob(1, 3, 2))
        assertEqual(whole.twin, TwinJob("twin 8899aabbccddeeff", "twin", "vision_encoder"))
        assertEqual(whole.gate, GateJob(37.0, 600.0))
        assertEqual(whole.threads, 2)
        assertEqual(least.answer ?: least.timing ?: least.twin ?: least.gate, null)
        assertEqual(least.threads, 0)
    }
}

private fun photo(entry: Fields) {
    val info = ImageInfo.of(entry.fields("image"))
    val pixels = Base64.getDecoder().decode(entry.text("photo"))
    val photo = Photo(entry.whole("height", 1..10_000), entry.whole("width", 1..10_000), pixels)
    val (got, expected) = photo.view(info).pixels to Base64.getDecoder().decode(entry.text("view"))
    assertEqual(got.size, expected.size)
    // One grey level: Pillow resizes rows or columns first, whichever is less work, and rounds in between.
    val worst = got.indices.maxOf { Math.abs((got[it].toInt() and 0xFF) - (expected[it].toInt() and 0xFF)) }
    assertTrue(worst <= 1, "$worst grey levels apart")
    val values = photo.pixelValues(info)
    assertEqual(values.shape, listOf(1, 3, info.height, info.width))
    for ((channel, wanted) in entry.doubles("pixel_values_corner").withIndex()) {
        val level = info.rescale / info.std[channel]
        val found = values.floats()[channel * info.height * info.width]
        assertTrue(Math.abs(found - wanted) <= level + 1e-6, "$found, not $wanted")
    }
}

private fun tokens(checks: Checks, entry: Fields) {
    val name = entry.text("name")
    val prompt by lazy {
        Prompt(Tokenizer.of(entry.value("tokenizer")), PromptInfo.of(entry.fields("prompt")))
    }
    for ((number, question) in entry.objects("questions") { json, place -> Fields(json, place) }.withIndex()) {
        checks.check("question $number of $name") {
            assertEqual(prompt.ids(question.text("text")), question.ids("ids"))
        }
    }
    for ((number, answer) in entry.objects("answers") { json, place -> Fields(json, place) }.withIndex()) {
        checks.check("answer $number of $name") {
            val stream = prompt.stream()
            val said = answer.ids("ids").joinToString("") { stream.append(it) } + stream.finish()
            assertEqual(said, answer.text("text"))
        }
    }
}

private fun walk(entry: Fields) {
    val room = entry.whole("room", 1..1000)
    val (before, firstText) = entry.whole("before", 0..100) to entry.whole("first_text", 1..100)
    val manifest = Manifest.of(exampleManifest(entry.value("graphs"), before, firstText, room))
    val calls = ArrayList<Call>()
    val answers = Answers(Graphs(manifest, manifest.graphs.map { SumGraph(it, calls) }))
    assertEqual(answers.room, room)
    assertEqual(answers.cacheBytes, entry.long("cache_bytes", 1L..1_000_000L))
    var seen = 0
    for (said in entry.objects("answers") { json, place -> Fields(json, place) }) {
        val photo = said.whole("photo", 1..2)
        if (photo != seen) answers.see(Tensor.ofFloats(listOf(1, 3, 2, 2), FloatArray(12) { photo.toFloat() }))
        seen = photo
        val heard = ArrayList<Int>()
        val ids =
            answers.answer(said.ids("question"), said.whole("count", 1..100), pastEnd = true) {
                heard += it
                true
            }
        assertEqual(ids, said.ids("ids"))
        assertEqual(heard, ids)
        assertEqual(answers.times.tokens.size, ids.size - 1)
    }
    val expected =
        entry.list("calls").map { json ->
            val (graph, sum, shapes) = (json as Json.Items).values
            val sizes = (shapes as Json.Items).values.map { Fields(Json.of("shape" to it), "call").ids("shape") }
            Call((graph as Json.Text).value, (sum as Json.Whole).value, sizes)
        }
    assertEqual(calls.size, expected.size)
    for ((got, wanted) in calls.zip(expected)) assertEqual(got, wanted)
    assertTrouble("do not fit") { answers.answer(listOf(1), room + 1) }
    assertTrouble("do not fit") { answers.answer(listOf(1), Int.MAX_VALUE) }
    assertTrouble("is empty") { answers.answer(emptyList(), 1) }
    assertEqual(answers.answer(listOf(1, 2), 5, pastEnd = true) { false }.size, 1)
}

private fun sampling(entry: Fields) {
    val logits = entry.doubles("logits").map { it.toFloat() }.toFloatArray()
    val sampling = Sampling(entry.number("temperature", 0.0..100.0), entry.number("top_p", 0.0..1.0), 7)
    val draws = 20_000
    val counts = IntArray(logits.size)
    repeat(draws) { counts[sampling.choose(logits)] += 1 }
    for ((token, share) in entry.doubles("shares").withIndex()) {
        val found = counts[token].toDouble() / draws
        assertTrue(Math.abs(found - share) < 0.015, "token $token in $found of the draws, not $share")
        assertTrue(share > 0 || counts[token] < 20, "token $token came ${counts[token]} times")
    }
}
