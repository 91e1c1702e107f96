// Graphs of a bundle in ONNX Runtime.

package io.pruneport.app

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtSession
import io.pruneport.core.DType
import io.pruneport.core.Engine
import io.pruneport.core.Given
import io.pruneport.core.GraphInfo
import io.pruneport.core.GraphRunner
import io.pruneport.core.Tensor
import io.pruneport.core.Trouble
import io.pruneport.core.millisecondsSince
import java.io.File

/** Opens ONNX graphs on the processor; weights in files beside a graph are found by the library itself. */
class OnnxEngine(override val version: String) : Engine {
    override val name = "onnxruntime"
    private var count = fastCores()

    override fun threads(wanted: Int): Int {
        count = if (wanted > 0) wanted else fastCores()
        return count
    }

    override fun open(graph: GraphInfo, folder: File): GraphRunner {
        val start = System.nanoTime()
        return guarded("cannot open ${graph.name}") {
            val environment = OrtEnvironment.getEnvironment()
            val options = OrtSession.SessionOptions()
            var whole = false
            try {
                options.setIntraOpNumThreads(count)
                val session = environment.createSession(File(folder, graph.file).path, options)
                whole = true
                OnnxGraph(graph, environment, session, options, millisecondsSince(start))
            } finally {
                if (!whole) options.close()
            }
        }
    }
}

private class OnnxGraph(
    override val info: GraphInfo,
    private val environment: OrtEnvironment,
    private val session: OrtSession,
    private val options: OrtSession.SessionOptions,
    override val loadMs: Double,
) : GraphRunner {
    private val names = info.outputs.map { it.name }.toSet()
    private val last = Given()
    private var isOpen = true

    override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> =
        guarded("failed in ${info.name}") {
            val lent = LinkedHashMap<String, OnnxTensor>()
            try {
                for (input in info.inputs) lent[input.name] = lent(inputs.getValue(input.name))
                session.run(lent, names).use { result -> info.outputs.associate { it.name to copied(it.name, result) } }
            } finally {
                lent.values.forEach { it.close() }
            }
        }

    /** The engine reads it where it lies. */
    private fun lent(tensor: Tensor): OnnxTensor {
        val shape = LongArray(tensor.shape.size) { tensor.shape[it].toLong() }
        // A buffer of its own, whose order is lost in copying.
        val bytes = tensor.bytes.duplicate().order(tensor.bytes.order())
        return OnnxTensor.createTensor(environment, bytes, shape, typeOf(tensor.dtype))
    }

    private fun copied(name: String, result: OrtSession.Result): Tensor {
        val output = info.output(name)
        val dtype = output.dtype
        val found = result.get(name).orElse(null) as? OnnxTensor ?: throw Trouble("${info.name} did not give $name")
        val told = found.getInfo()
        if (told.type != typeOf(dtype)) throw Trouble("$name came as ${told.type}, not ${dtype.word}")
        val made = last.tensor(output, told.getShape().map { it.toInt() })
        val bytes = found.getByteBuffer()
        if (bytes.remaining() != made.bytes.capacity()) throw Trouble("$name came with ${bytes.remaining()} bytes")
        made.bytes.duplicate().put(bytes)
        return made
    }

    override fun close() {
        // The library wants the options to outlive the session, and neither to be closed twice.
        if (isOpen) {
            isOpen = false
            guarded("cannot close ${info.name}") { session.close() }
            options.close()
        }
    }
}

private fun typeOf(dtype: DType): OnnxJavaType =
    when (dtype) {
        DType.FLOAT32 -> OnnxJavaType.FLOAT
        DType.FLOAT16 -> OnnxJavaType.FLOAT16
        DType.INT64 -> OnnxJavaType.INT64
        DType.INT32 -> OnnxJavaType.INT32
        DType.INT8 -> OnnxJavaType.INT8
        DType.UINT8 -> OnnxJavaType.UINT8
        DType.BOOL -> OnnxJavaType.BOOL
    }

private fun <T> guarded(what: String, block: () -> T): T =
    try {
        block()
    } catch (error: OrtException) {
        throw Trouble("ONNX Runtime $what: ${error.message ?: error}")
    } catch (error: LinkageError) {
        throw Trouble("ONNX Runtime is not whole in this app: ${error.message ?: error}", missing = true)
    }
