def library_path():
    return "/work/main/engine/librlsd.so"
