// What the app's activities have in common: its version, its engines, the folder of its bundles.

package io.pruneport.app

import android.content.Context
import android.content.pm.PackageManager
import io.pruneport.core.Engine
import io.pruneport.core.Manifest
import java.io.File

internal const val TAG = "pruneport"

internal fun appVersion(context: Context): String =
    context.packageManager.getPackageInfo(context.packageName, 0).versionName ?: "unknown"

/** All engines of this app, with the versions that the build put into the manifest. */
internal fun allEngines(context: Context): List<Engine> {
    val told =
        context.packageManager.getApplicationInfo(context.packageName, PackageManager.GET_META_DATA).metaData

    fun version(engine: String) = told?.getString("io.pruneport.$engine")?.removePrefix("v") ?: "unknown"
    return listOf(ExecuTorchEngine(version("executorch")), OnnxEngine(version("onnxruntime")))
}

/** Where a computer copies bundles to; null where the phone has no such storage now. */
internal fun bundlesFolder(context: Context): File? = context.getExternalFilesDir(null)

/** The bundles that lie there, by name. */
internal fun bundles(context: Context): List<File> =
    bundlesFolder(context)?.listFiles().orEmpty().filter { File(it, Manifest.FILE).isFile }.sortedBy { it.name }

/** An error in words. */
internal fun said(error: Throwable): String = error.message?.takeIf { it.isNotBlank() } ?: error.toString()
