// The macros of <windows.h>. The standard library's headers may be included before them, for some
// undefine them.
#if __has_include(<bits/stdc++.h>)
#include <bits/stdc++.h>
#endif
#include <httplib.h>
#include <nlohmann/json.hpp>

#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
#include "coordination.hpp"
#if !defined(min) || !defined(max)
#error "the macros must have been there to the end"
#endif
