// The phone as its system tells: what it is, how hot, how charged, how much memory this app takes.

package io.pruneport.app

import android.app.ActivityManager
import android.content.Context
import android.content.Intent
import android.content.IntentFilter
import android.os.BatteryManager
import android.os.Build
import android.os.PowerManager
import io.pruneport.core.Condition
import io.pruneport.core.DeviceInfo
import io.pruneport.core.DeviceKind
import io.pruneport.core.DeviceState
import java.io.File
import java.io.IOException

/** The phone that this app runs on; its thermometer is the battery's, the only one that apps may read. */
class PhoneState(private val context: Context) : DeviceState {
    private val power = context.getSystemService(Context.POWER_SERVICE) as PowerManager
    private val activities = context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager

    override val info: DeviceInfo
        get() =
            DeviceInfo(
                name = "${Build.MANUFACTURER} ${Build.MODEL}",
                kind = if (isSimulator) DeviceKind.SIMULATOR else DeviceKind.PHONE,
                os = "Android ${Build.VERSION.RELEASE} (API ${Build.VERSION.SDK_INT})",
                abi = Build.SUPPORTED_ABIS.firstOrNull().orEmpty(),
                soc = soc(),
                cores = Runtime.getRuntime().availableProcessors(),
                ramBytes = memory().totalMem,
            )

    /** The names that Google's phone on a computer gives its hardware. */
    private val isSimulator get() = Build.HARDWARE in setOf("goldfish", "ranchu", "cutf_cvm")

    override fun condition(): Condition {
        // What was sent last; nobody is registered.
        val battery = context.registerReceiver(null, IntentFilter(Intent.ACTION_BATTERY_CHANGED))
        fun told(key: String): Int? = battery?.getIntExtra(key, UNTOLD)?.takeIf { it != UNTOLD }
        val level = told(BatteryManager.EXTRA_LEVEL)
        val scale = told(BatteryManager.EXTRA_SCALE)
        return Condition(
            thermal = thermalStatus()?.let { THERMAL_WORDS.getOrElse(it) { "unknown" } },
            // Tenths of a degree; devices without a battery say 0.
            celsius = told(BatteryManager.EXTRA_TEMPERATURE)?.takeIf { it != 0 }?.let { it / 10.0 },
            battery = if (level == null || scale == null || scale <= 0) null else part(level, scale),
            charging = told(BatteryManager.EXTRA_PLUGGED)?.let { it != 0 },
            lowPower = power.isPowerSaveMode,
        )
    }

    override val isThrottled: Boolean get() = (thermalStatus() ?: 0) > 0

    override val peakBytes: Long get() = status("VmHWM")

    override val bytes: Long get() = status("VmRSS")

    override val availableBytes: Long get() = memory().availMem

    private fun memory() = ActivityManager.MemoryInfo().also { activities.getMemoryInfo(it) }

    /** Asked by name: the method came with API 29. */
    private fun thermalStatus(): Int? =
        if (Build.VERSION.SDK_INT < 29) {
            null
        } else {
            try {
                PowerManager::class.java.getMethod("getCurrentThermalStatus").invoke(power) as? Int
            } catch (_: ReflectiveOperationException) {
                null
            }
        }

    /** Asked by name: the fields came with API 31. */
    private fun soc(): String =
        if (Build.VERSION.SDK_INT < 31) {
            Build.HARDWARE
        } else {
            try {
                val names = listOf("SOC_MANUFACTURER", "SOC_MODEL")
                names.joinToString(" ") { Build::class.java.getField(it).get(null).toString() }
            } catch (_: ReflectiveOperationException) {
                Build.HARDWARE
            }
        }

    private companion object {
        const val UNTOLD = Int.MIN_VALUE

        /** The system's words, in the order of its numbers. */
        val THERMAL_WORDS = listOf("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")

        fun part(level: Int, scale: Int): Double = (level.toDouble() / scale).coerceIn(0.0, 1.0)

        /** A line of the kernel's account of this process, in bytes; 0 where it does not tell. */
        fun status(key: String): Long =
            try {
                val line = File("/proc/self/status").useLines { lines -> lines.firstOrNull { it.startsWith("$key:") } }
                (line?.filter { it.isDigit() }?.toLongOrNull() ?: 0) * 1024
            } catch (_: IOException) {
                0
            }
    }
}
