// What adb starts: runs one job, leaves its findings in the app's own folder, and ends.

package io.pruneport.app

import android.app.Activity
import android.os.Bundle
import android.util.Log
import android.view.WindowManager
import android.widget.TextView
import java.io.File
import java.util.concurrent.Executors

/**
 * Takes the extra `job`, the folder of a job, and perhaps `bundle` and `twin`, where those do not lie in it; or
 * minibench's `model_dir`, `num_iter`, `num_warm_up_iter` and `prompt`. The manifest lets adb alone start it.
 *
 * Findings lie in files/jobs/NAME, where NAME is what the folder is called, or `minibench`.
 */
class BenchActivity : Activity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        // Behind a lock or a dark screen the system gives an app slow cores alone.
        window.addFlags(AWAKE)
        val view = TextView(this)
        view.fitsSystemWindows = true
        val space = (SPACE_DP * resources.displayMetrics.density).toInt()
        view.setPadding(space, space, space, space)
        setContentView(view)
        val wanted = wanted()
        if (wanted == null) {
            Log.e(TAG, "there is no job: give --es job DIR, or --es model_dir DIR")
            finish()
            return
        }
        // Made anew by the system: the job goes on, but has no screen to write to.
        if (savedInstanceState != null) return
        val context = applicationContext
        worker.execute {
            HeadlessJob(context, wanted) { stage ->
                Log.i(TAG, stage)
                runOnUiThread { view.text = stage }
            }.run()
            runOnUiThread { finish() }
        }
    }

    private fun wanted(): Wanted? {
        val asked = intent ?: return null
        asked.getStringExtra("job")?.let { job ->
            val folder = File(job)
            val (bundle, twin) = listOf("bundle", "twin").map { asked.getStringExtra(it)?.let(::File) }
            return if (isPlain(folder.name)) Wanted.Job(folder, bundle, twin) else null
        }
        val bundle = asked.getStringExtra("model_dir") ?: return null
        return Wanted.Bare(
            File(bundle), number("num_iter", 1), number("num_warm_up_iter", 0), asked.getStringExtra("prompt"),
        )
    }

    /** True for the name of a folder that cannot lead out of the one it is in. */
    private fun isPlain(name: String) = name.isNotEmpty() && name != "." && name != ".."

    /** An extra that may come as a number or as text; null where it is neither, or less than [least]. */
    private fun number(key: String, least: Int): Int? {
        if (intent?.hasExtra(key) != true) return null
        val found = intent.getIntExtra(key, Int.MIN_VALUE)
        val number = if (found != Int.MIN_VALUE) found else intent.getStringExtra(key)?.toIntOrNull()
        return number?.takeIf { it >= least }
    }

    private companion object {
        const val SPACE_DP = 16

        // By the flags that API 28 has as well; the methods that came in their place do the same.
        @Suppress("DEPRECATION")
        const val AWAKE =
            WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON or WindowManager.LayoutParams.FLAG_TURN_SCREEN_ON or
                WindowManager.LayoutParams.FLAG_SHOW_WHEN_LOCKED

        /** One job at a time, and one behind the other. */
        val worker = Executors.newSingleThreadExecutor()
    }
}
