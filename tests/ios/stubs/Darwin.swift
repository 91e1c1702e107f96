// What the app uses of Darwin beyond what Linux has under the same names. Behind `//=` stands what
// @nativescript/types-ios calls a name, which a test looks up.

@_exported import Glibc

public typealias integer_t = Int32  //- a number
public typealias natural_t = UInt32  //- a number
public typealias kern_return_t = Int32  //- a number
public typealias mach_msg_type_number_t = natural_t  //- a number
public typealias task_flavor_t = natural_t  //- a number
public typealias task_info_t = UnsafeMutablePointer<integer_t>  //- a pointer
public var mach_task_self_: natural_t { 0 }  //= mach_task_self_
public var TASK_VM_INFO: Int32 { 22 }  //- a macro
public var KERN_SUCCESS: Int32 { 0 }  //- a macro

public struct task_vm_info_data_t {  //= task_vm_info
  public var phys_footprint: UInt64 = 0  //= task_vm_info.phys_footprint
  public var ledger_phys_footprint_peak: Int64 = 0  //= task_vm_info.ledger_phys_footprint_peak
  public init() {}  //= task_vm_info
}

@discardableResult
public func task_info(  //= task_info
  _ target_task: natural_t, _ flavor: task_flavor_t, _ task_info_out: task_info_t,
  _ task_info_outCnt: UnsafeMutablePointer<mach_msg_type_number_t>
) -> kern_return_t { KERN_SUCCESS }
