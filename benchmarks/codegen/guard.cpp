// Builds of torch for CPUs have no guard for the CUDA device type, and refuse even fake tensors of it. This one switches
// nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using CudaWithoutDevice = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, CudaWithoutDevice)
