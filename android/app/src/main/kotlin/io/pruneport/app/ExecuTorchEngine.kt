// Graphs of a bundle in ExecuTorch.

package io.pruneport.app

import io.pruneport.core.DType
import io.pruneport.core.Engine
import io.pruneport.core.Given
import io.pruneport.core.GraphInfo
import io.pruneport.core.GraphRunner
import io.pruneport.core.Tensor
import io.pruneport.core.TensorInfo
import io.pruneport.core.Trouble
import io.pruneport.core.millisecondsSince
import java.io.File
import java.io.IOException
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.DType as EngineDType
import org.pytorch.executorch.Tensor as EngineTensor

/** Opens ExecuTorch programs; graphs of one file share the open program, and so its weights. */
class ExecuTorchEngine(override val version: String) : Engine {
    override val name = "executorch"
    private val opened = HashMap<String, Program>()
    private var count = fastCores()

    // The library has one pool for all; it is always told how many, since it does not tell what it chose.
    override fun threads(wanted: Int): Int {
        count = if (wanted > 0) wanted else fastCores()
        return count
    }

    override fun open(graph: GraphInfo, folder: File): GraphRunner {
        if (graph.extraFiles.isNotEmpty()) {
            throw Trouble(
                "${graph.name} keeps weights in ${graph.extraFiles[0]}, which ExecuTorch's Java cannot open",
                missing = true,
            )
        }
        val path = File(folder, graph.file).path
        val start = System.nanoTime()
        return guarded("cannot open ${graph.name}") {
            synchronized(opened) {
                val program = opened.getOrPut(path) { Program(Module.load(path, Module.LOAD_MODE_MMAP, count)) }
                program.users++
                var whole = false
                try {
                    val method = if (graph.stored in program.module.methods) graph.stored else "forward"
                    program.module.loadMethod(method)
                    whole = true
                    ExecuTorchGraph(graph, program.module, method, millisecondsSince(start)) { leave(path) }
                } finally {
                    if (!whole) leave(path)
                }
            }
        }
    }

    private fun leave(path: String) {
        synchronized(opened) {
            val program = opened[path] ?: return
            program.users--
            if (program.users == 0) {
                opened.remove(path)
                program.module.close()
            }
        }
    }

    private class Program(val module: Module) {
        var users = 0
    }
}

private class ExecuTorchGraph(
    override val info: GraphInfo,
    private val module: Module,
    private val method: String,
    override val loadMs: Double,
    private val leave: () -> Unit,
) : GraphRunner {
    private val last = Given()
    private var isOpen = true

    override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
        val taken = info.inputs.map { EValue.from(lent(it, inputs.getValue(it.name))) }
        val given = guarded("failed in ${info.name}") { module.execute(method, *taken.toTypedArray()) }
        if (given.size != info.outputs.size) {
            throw Trouble("${info.name} gave ${given.size} outputs, not ${info.outputs.size}")
        }
        val outputs = LinkedHashMap<String, Tensor>()
        for ((number, output) in info.outputs.withIndex()) {
            outputs[output.name] = guarded("gave no ${output.name}") { copied(output, given[number].toTensor()) }
        }
        return outputs
    }

    /** The engine reads it where it lies. */
    private fun lent(info: TensorInfo, tensor: Tensor): EngineTensor {
        val shape = LongArray(tensor.shape.size) { tensor.shape[it].toLong() }
        val bytes = tensor.bytes
        return when (info.dtype) {
            DType.FLOAT32 -> EngineTensor.fromBlob(bytes.asFloatBuffer(), shape)
            DType.FLOAT16 -> EngineTensor.fromBlob(bytes.asShortBuffer(), shape)
            DType.INT64 -> EngineTensor.fromBlob(bytes.asLongBuffer(), shape)
            DType.INT32 -> EngineTensor.fromBlob(bytes.asIntBuffer(), shape)
            DType.INT8 -> EngineTensor.fromBlob(bytes, shape)
            DType.UINT8 -> EngineTensor.fromBlobUnsigned(bytes, shape)
            DType.BOOL -> throw Trouble("ExecuTorch's Java takes no bool, as ${info.name} is", missing = true)
        }
    }

    /** Copied: the library's memory is its own again with the next run. */
    private fun copied(info: TensorInfo, found: EngineTensor): Tensor {
        val expected =
            when (info.dtype) {
                DType.FLOAT32 -> EngineDType.FLOAT
                DType.FLOAT16 -> EngineDType.HALF
                DType.INT64 -> EngineDType.INT64
                DType.INT32 -> EngineDType.INT32
                DType.INT8 -> EngineDType.INT8
                DType.UINT8 -> EngineDType.UINT8
                DType.BOOL -> throw Trouble("ExecuTorch's Java gives no bool, as ${info.name} is", missing = true)
            }
        if (found.dtype() != expected) throw Trouble("${info.name} came as ${found.dtype()}, not ${info.dtype.word}")
        val made = last.tensor(info, found.shape().map { it.toInt() })
        val bytes = made.bytes
        when (info.dtype) {
            DType.FLOAT32 -> found.copyDataInto(bytes.asFloatBuffer())
            DType.FLOAT16 -> found.copyDataInto(bytes.asShortBuffer())
            DType.INT64 -> found.copyDataInto(bytes.asLongBuffer())
            DType.INT32 -> found.copyDataInto(bytes.asIntBuffer())
            DType.INT8 -> found.copyDataInto(bytes.duplicate())
            else -> found.copyDataIntoUnsigned(bytes.duplicate())
        }
        return made
    }

    override fun close() {
        if (isOpen) leave()
        isOpen = false
    }
}

/** Says what failed in words; errors of the library's loading are links that lack their native half. */
private fun <T> guarded(what: String, block: () -> T): T =
    try {
        block()
    } catch (error: Trouble) {
        throw error
    } catch (error: Exception) {
        throw Trouble("ExecuTorch $what: ${error.message ?: error}")
    } catch (error: LinkageError) {
        throw Trouble("ExecuTorch is not whole in this app: ${error.message ?: error}", missing = true)
    }

/** How many cores come within a fifth of the fastest; all of them where the system does not tell. */
internal fun fastCores(): Int {
    val all = Runtime.getRuntime().availableProcessors()
    val speeds =
        (0 until all).map { core ->
            try {
                File("/sys/devices/system/cpu/cpu$core/cpufreq/cpuinfo_max_freq").readText().trim().toLongOrNull()
            } catch (_: IOException) {
                null
            }
        }
    val known = speeds.map { it ?: return all }
    val fastest = known.maxOrNull() ?: return all
    return known.count { it * 5 >= fastest * 4 }
}
