// Memory for large tensors outside of the app's heap, which Android keeps small.

package io.pruneport.app

import android.app.Application
import android.os.SharedMemory
import android.system.ErrnoException
import io.pruneport.core.Tensor
import java.nio.ByteBuffer

/** Gives the core its memory before any part of the app asks for tensors. */
class PruneportApp : Application() {
    override fun onCreate() {
        super.onCreate()
        Tensor.memory = ::phoneMemory
    }
}

// Below this a mapping of its own costs more than it is worth; Java's direct buffers lie in the heap.
private const val LARGE = 1 shl 18

/** Throws OutOfMemoryError. */
private fun phoneMemory(size: Int): ByteBuffer {
    if (size < LARGE) return ByteBuffer.allocateDirect(size)
    try {
        // The mapping outlives what it was made of, until its buffer and all parts of it are collected.
        return SharedMemory.create("tensor", size).use { it.mapReadWrite() }
    } catch (error: ErrnoException) {
        throw OutOfMemoryError(error.message)
    }
}
