// What the walk needs of an engine: graphs that run.

package io.pruneport.core

import java.io.File

/** One open graph of a bundle, in whatever engine. */
interface GraphRunner : AutoCloseable {
    val info: GraphInfo

    /** How long it took to open. */
    val loadMs: Double

    /**
     * Runs it once, named tensors in and out. What it gives may lie in the engine's memory until it runs again.
     *
     * What it is given has the names, dtypes and shapes of [info]. Throws Trouble.
     */
    fun run(inputs: Map<String, Tensor>): Map<String, Tensor>

    override fun close() {}
}

/** The tensors that a graph gave last: the next run writes into their memory again where it gives the same shape. */
class Given {
    private val last = HashMap<String, Tensor>()

    /** The tensor of a name to be written whole. Throws Trouble for a shape that no memory holds. */
    fun tensor(info: TensorInfo, shape: List<Int>): Tensor {
        val before = last[info.name]
        if (before != null && before.dtype == info.dtype && before.shape == shape) return before
        return Tensor(info.dtype, shape).also { last[info.name] = it }
    }
}

/** Files that an engine makes when it opens a graph for the first time on a device. */
enum class Preparation {
    /** It makes none: every opening is like the first. */
    NONE,
    MISSING,
    THERE,
}

/** What opens graphs. */
interface Engine {
    /** The word for it in a manifest: `executorch`, `onnxruntime`. */
    val name: String
    val version: String
    val commit: String get() = ""

    /** How many threads are in force once so many are wanted, 0 being its own choice. */
    fun threads(wanted: Int): Int

    /** How far the files are that make later openings faster than the first one on this device. */
    fun preparation(graph: GraphInfo, folder: File): Preparation = Preparation.NONE

    /** Opens a graph of the bundle in [folder]. Throws Trouble. */
    fun open(graph: GraphInfo, folder: File): GraphRunner
}

/** All graphs of a bundle, open. */
class Graphs(val manifest: Manifest, runners: List<GraphRunner>) : AutoCloseable {
    private val runners = runners.associateBy { it.info.name }

    fun has(name: String): Boolean = name in runners

    /** Throws Trouble. */
    operator fun get(name: String): GraphRunner =
        runners[name] ?: throw Trouble("${manifest.name} has no $name; export it whole, without --only")

    /** Runs a graph once it was made sure that it gets what it takes, and gives what it says. Throws Trouble. */
    fun run(name: String, inputs: Map<String, Tensor>): Map<String, Tensor> {
        val runner = this[name]
        if (runner.info.states.isNotEmpty()) {
            throw Trouble("$name keeps states, which no engine of this app does", missing = true)
        }
        val taken = LinkedHashMap<String, Tensor>()
        for (info in runner.info.inputs) {
            val tensor = inputs[info.name] ?: throw Trouble("$name was not given ${info.name}")
            info.check(tensor, name)
            taken[info.name] = tensor
        }
        val given = runner.run(taken)
        for (info in runner.info.outputs) {
            info.check(given[info.name] ?: throw Trouble("$name did not give ${info.name}"), name)
        }
        return given
    }

    override fun close() = runners.values.forEach { it.close() }

    companion object {
        /** Opens all graphs of a manifest. Throws Trouble; `missing` where there is no engine for one. */
        fun open(manifest: Manifest, folder: File, engines: List<Engine>): Graphs {
            manifest.checkFiles(folder)
            val opened = ArrayList<GraphRunner>()
            var whole = false
            try {
                for (graph in manifest.graphs) opened += engineFor(graph, engines).open(graph, folder)
                whole = true
            } finally {
                if (!whole) opened.forEach { it.close() }
            }
            return Graphs(manifest, opened)
        }
    }
}

/** Throws Trouble where no engine is for this graph. */
fun engineFor(graph: GraphInfo, engines: List<Engine>): Engine =
    engines.firstOrNull { it.name == graph.engine }
        ?: throw Trouble("${graph.name} is for ${graph.engine}, which this app does not have", missing = true)
