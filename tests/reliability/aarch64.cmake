# Builds for 64-bit ARM on another machine and runs the result under QEMU, with the root that campaigns.mk makes.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static;-cpu;neoverse-n1;-L;${CMAKE_BINARY_DIR}/root)
