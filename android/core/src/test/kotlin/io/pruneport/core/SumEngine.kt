// An engine for tests: its graphs give whole numbers below 97 that depend on every input and its place.

package io.pruneport.core

import java.io.File

/** One call of a graph: its name, the sum over all it was given, the shapes of its inputs. */
data class Call(val graph: String, val sum: Long, val shapes: List<List<Int>>)

/** The graph that tests/phones/make_vectors.py defines; it writes over what it gave before, as engines may. */
class SumGraph(override val info: GraphInfo, private val calls: MutableList<Call>) : GraphRunner {
    override val loadMs = 0.25
    private val last = Given()

    override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
        var sum = 0L
        for ((number, taken) in info.inputs.withIndex()) {
            for ((k, x) in inputs.getValue(taken.name).wholes().withIndex()) sum += (number + 1) * x * (1 + k % 7)
        }
        val shapes = info.inputs.map { inputs.getValue(it.name).shape }
        calls += Call(info.name, sum, shapes)
        return info.outputs.withIndex().associate { (number, made) ->
            val shape = made.shape.mapIndexed { axis, size -> if (axis in made.dynamic) shapes[0][1] else size }
            val values = List(Tensor.count(shape).toInt()) { Math.floorMod(sum + 31 * (number + 1) + 7 * it, 97L) }
            val new =
                if (made.dtype == DType.FLOAT32) {
                    Tensor.ofFloats(shape, FloatArray(values.size) { values[it].toFloat() })
                } else {
                    Tensor.ofWholes(made.dtype, shape, values)
                }
            made.name to last.tensor(made, shape).also { it.bytes.duplicate().put(new.toByteArray()) }
        }
    }
}

class SumEngine(override val name: String) : Engine {
    override val version = "1"
    val calls = ArrayList<Call>()
    private val prepared = HashSet<String>()

    override fun threads(wanted: Int) = maxOf(wanted, 1)

    override fun preparation(graph: GraphInfo, folder: File) =
        if (folder.path + graph.name in prepared) Preparation.THERE else Preparation.MISSING

    override fun open(graph: GraphInfo, folder: File): GraphRunner {
        prepared += folder.path + graph.name
        return SumGraph(graph, calls)
    }
}

/** A computer that is as hot as it is told to be. */
class TestDevice(private var celsius: Double? = 30.0, private val coolsBy: Double = 0.0) : DeviceState {
    override val info = DeviceInfo("a test", DeviceKind.DESKTOP, "Linux", "x86_64", "", 2, 1L shl 30)
    override val isThrottled = false
    override val peakBytes = 2_000_000L
    override val bytes = 1_000_000L
    override val availableBytes = 3_000_000L

    override fun condition(): Condition {
        val now = celsius
        celsius = now?.minus(coolsBy)
        return Condition("nominal", now, 0.5, charging = false, lowPower = false)
    }
}

/** A manifest around graphs, with the least of everything else. */
fun exampleManifest(graphs: Json, before: Int = 3, firstText: Int = 13, tokens: Int = 90): Json.Members {
    val text =
        """
        {"schema_version": 2, "name": "walk", "model": "tiny", "target": {"backend": "xnnpack", "precision": "fp32"},
         "prune": {"cut": 1, "image_tokens": 10, "keep": 4, "grid": [2, 5]},
         "image": {"size": [2, 2], "resize_shortest": 2, "rescale": 0.5, "mean": [0, 0, 0], "std": [1, 1, 1]},
         "prompt": {"prefix_ids": []}, "frame": {"before": $before, "image": 10, "first_text": $firstText},
         "text": {"tokens": $tokens, "chunk": 8}}
        """
    val members = Json.parse(text, "manifest.json") as Json.Members
    return Json.Members(members.values + ("graphs" to graphs))
}
