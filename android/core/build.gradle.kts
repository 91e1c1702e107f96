// The core: Kotlin's standard library and Java 8, which every phone that the app runs on has.

import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    alias(libs.plugins.kotlin.jvm)
}

java {
    sourceCompatibility = JavaVersion.VERSION_1_8
    targetCompatibility = JavaVersion.VERSION_1_8
}

kotlin {
    compilerOptions {
        jvmTarget = JvmTarget.JVM_1_8
        allWarningsAsErrors = true
        freeCompilerArgs.add("-Xjdk-release=8")
    }
}

// The tests are a program: it prints what fails, and a last line that counts.
val checks by tasks.registering(JavaExec::class) {
    group = "verification"
    description = "Holds the core against tests/phones/vectors."
    classpath = sourceSets["test"].runtimeClasspath
    mainClass = "io.pruneport.core.VectorsKt"
    systemProperty("pruneport.vectors", rootDir.resolveSibling("tests/phones/vectors").path)
}

tasks.named("check") { dependsOn(checks) }
