// Whole jobs: ones that cannot be run are written down, hot devices are waited for.

package io.pruneport.core

import java.io.File

private const val LEAST =
    "{\"id\": \"0123456789abcdef\", \"bundle\": \"b\", \"vision\": \"vision_encoder\", \"steps\": []"

private const val VISION =
    """[{"name": "vision_encoder", "file": "a.pte", "engine": "executorch",
      "inputs": [{"name": "pixel_values", "shape": [1, 3, 2, 2], "dtype": "float32"}],
      "outputs": [{"name": "hidden", "shape": [1, 7, 4], "dtype": "float32"}]}]"""

private fun run(folder: File, device: DeviceState = TestDevice(), engines: List<Engine> = emptyList()): Findings =
    JobRun(Place(folder), device, engines, "tests", "1").run(File(folder, "out"))

private fun written(folder: File) = Fields(Json.read(File(folder, "out/findings.json"), 1 shl 20), "findings")

/** A job over one graph, with its bundle beside it. */
private fun bundle(folder: File, more: String) {
    File(folder, "bundle").mkdirs()
    File(folder, "bundle/a.pte").writeText("abc")
    val json = exampleManifest(Json.parse(VISION, "graphs"))
    val files = "files" to Json.parse("{\"a.pte\": {\"size_bytes\": 3}}", "files")
    File(folder, "bundle/manifest.json").writeText(Json.Members(json.values + files).written())
    File(folder, "job.json").writeText("$LEAST, $more}")
    val pixels = Tensor.ofFloats(listOf(1, 3, 2, 2), FloatArray(12) { it.toFloat() })
    val inputs =
        mapOf(
            "in/vision_encoder/vision_encoder/pixel_values" to pixels,
            "photo" to Tensor(DType.UINT8, listOf(4, 5, 3)),
        )
    Safetensors.write(inputs, File(folder, "inputs.safetensors"))
}

private const val STEP =
    "\"steps\": [{\"graph\": \"vision_encoder\", \"stored\": \"vision_encoder\", \"step\": \"vision_encoder\"}]"

fun jobs(checks: Checks) {
    checks.check("what cannot be run is said") {
        withFolder { folder ->
            assertTrouble("job.json cannot be read") { run(folder) }
            File(folder, "job.json").writeText("$LEAST}")
            assertEqual(run(folder).trouble?.message, "inputs.safetensors cannot be read")
            Safetensors.write(mapOf("a" to Tensor(DType.INT8, listOf(1))), File(folder, "inputs.safetensors"))
            assertEqual(run(folder).trouble?.message, "manifest.json cannot be read")
            assertEqual(written(folder).text("job"), "0123456789abcdef")
            assertEqual(written(folder).fields("trouble").flag("missing"), false)
            File(folder, "file").writeText("")
            assertTrouble("cannot be written") {
                JobRun(Place(folder), TestDevice(), emptyList(), "tests", "1").run(File(folder, "file"))
            }
        }
    }
    checks.check("an engine that is not there") {
        withFolder { folder ->
            bundle(folder, "\"threads\": 1")
            assertEqual(run(folder).trouble?.missing, true)
            assertEqual(written(folder).fields("runner").text("engine"), "executorch")
        }
    }
    checks.check("steps, a photo without a question, and a hot device") {
        withFolder { folder ->
            bundle(folder, "\"timing\": {\"warmup\": 1, \"runs\": 3}, \"gate\": {\"most_celsius\": 37, \"wait_s\": 9}")
            File(folder, "job.json").writeText(File(folder, "job.json").readText().replace("\"steps\": []", STEP))
            val found = run(folder, TestDevice(38.5, coolsBy = 1.0), listOf(SumEngine("executorch")))
            assertEqual(found.trouble ?: found.steps.single().trouble, null)
            assertEqual(found.steps.single().warmupMs.size to found.steps.single().runMs.size, 1 to 3)
            assertEqual(found.load.firstMs.size to found.load.laterMs.size, 1 to 1)
            assertEqual(found.gate?.passed, true)
            val outputs = Safetensors.read(File(folder, "out/outputs.safetensors"))
            assertEqual(outputs.keys, setOf("out/vision_encoder/vision_encoder/hidden", "pixel_values"))
            assertEqual(written(folder).list("conditions").size, 3)
            assertTrue(File(folder, "out/benchmark_results.json").length() > 2, "minibench's entries are there")
            assertTrue(File(folder, "out").list().orEmpty().none { it.startsWith(".") }, "nothing is left over")
        }
    }
    checks.check("a device that stays hot") {
        withFolder { folder ->
            val gate = "\"gate\": {\"most_celsius\": 37, \"wait_s\": 0.5}"
            bundle(folder, "\"timing\": {\"warmup\": 0, \"runs\": 1}, $gate")
            File(folder, "job.json").writeText(File(folder, "job.json").readText().replace("\"steps\": []", STEP))
            val found = run(folder, TestDevice(50.0), listOf(SumEngine("executorch")))
            assertEqual(found.gate?.passed, false)
            assertTrue((found.gate?.waitedS ?: 0.0) in 0.5..5.0, "it waited for ${found.gate?.waitedS} s")
            assertEqual(written(folder).fields("gate").flag("passed"), false)
        }
    }
    checks.check("an engine that breaks") {
        class Broken : Engine by SumEngine("executorch") {
            override fun open(graph: GraphInfo, folder: File): GraphRunner =
                object : GraphRunner {
                    override val info = graph
                    override val loadMs = 0.0

                    override fun run(inputs: Map<String, Tensor>) = throw IllegalStateException("it broke")
                }
        }
        withFolder { folder ->
            bundle(folder, "\"threads\": 1")
            File(folder, "job.json").writeText(File(folder, "job.json").readText().replace("\"steps\": []", STEP))
            val found = run(folder, engines = listOf(Broken()))
            assertEqual(found.trouble, null)
            assertTrue("it broke" in found.steps.single().trouble?.message.orEmpty(), "what broke is said")
        }
    }
    checks.check("medians") {
        assertEqual(median(listOf(3.0, 1.0, 2.0, 10.0)), 2.5)
        assertEqual(median(emptyList()), null)
    }
}
