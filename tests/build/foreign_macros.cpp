// Macros of X11, AssertMacros.h, <windows.h> and Arduino, and then the header.
#define None 0L
#define Status int
#define Bool int
#define True 1
#define False 0
#define Success 0
#define Always 2
#define Complex 0
#define Unsorted 0
#define Below 1
#define Above 0
#define Convex 2
#define Expose 12
#define KeyPress 2
#define DestroyAll 0
#define Debug 1
#define Info 2
#define require(c, l) \
  do {                \
    if (!(c)) goto l; \
  } while (0)
#define check(c) \
  do {           \
    if (!(c))    \
      ;          \
  } while (0)
#define verify(c) \
  do {            \
    if (!(c))     \
      ;           \
  } while (0)
#define require_noerr(c, l) require(!(c), l)
#define require_string(c, l, s) require(c, l)
#define delay(x) ((void)(x))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define ERROR 0
#define DELETE 0x00010000L
#define IGNORE 0
#define interface struct
#define small char
#define near
#define far
#define CALLBACK
#define GetObject GetObjectA
#define Yield()
#define DEBUG 1
#define INFO 1
#define Unknown 0
#define Nil 0
#include "coordination.hpp"
#if None != 0L || !defined(Status) || Debug != 1 || Info != 2 || !defined(check) || \
    !defined(verify) || !defined(require) || !defined(delay)
#error "the macros must be there after it"
#endif

int main() {
  auto c = coordination::Coordinator::in_memory();
  return c.client().status() && c.close() ? 0 : 1;
}
