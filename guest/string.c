#include "sys.h"

void* memcpy(void* to, const void* from, usize size) {
    void* result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return result;
}

void* memset(void* to, int value, usize size) {
    void* result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
    return result;
}

void* memmove(void* to, const void* from, usize size) {
    u8* target = to;
    const u8* source = from;
    if (target <= source) {
        memcpy(to, from, size);  // which goes upwards
    } else {
        for (usize i = size; i-- > 0;) target[i] = source[i];
    }
    return to;
}
