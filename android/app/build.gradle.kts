// The app: engines, the phone's state, a job without a screen and a screen, around the core.

import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.android)
}

android {
    namespace = "io.pruneport.app"
    compileSdk = 35

    defaultConfig {
        applicationId = "io.pruneport.app"
        minSdk = 28
        targetSdk = 35
        versionCode = 1
        versionName = "0.1.0"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
        // The libraries do not tell their versions; findings say what was built in.
        manifestPlaceholders["executorchVersion"] = libs.versions.executorch.get()
        manifestPlaceholders["onnxruntimeVersion"] = libs.versions.onnxruntime.get()
    }

    buildTypes {
        // What is measured: compiled like a release, and still open to `run-as`, by which findings are pulled.
        create("bench") {
            initWith(getByName("release"))
            isDebuggable = true
            signingConfig = signingConfigs.getByName("debug")
            matchingFallbacks += "release"
        }
    }

    // Each engine may bring C++'s library along; one serves all.
    packaging { jniLibs { pickFirsts += "**/libc++_shared.so" } }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }
}

kotlin {
    compilerOptions { jvmTarget = JvmTarget.JVM_1_8 }
}

dependencies {
    implementation(project(":core"))
    implementation(libs.executorch.android)
    implementation(libs.onnxruntime.android)
}
