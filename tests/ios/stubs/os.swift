// What the app uses of os. Behind `//=` stands what @nativescript/types-ios calls a name, which a test looks up.

public func os_proc_available_memory() -> Int { 0 }  //= os_proc_available_memory
