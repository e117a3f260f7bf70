// Calls every kernel of every table this processor can run; 1 where a result is wrong, and sanitizers abort by
// themselves.
#include "harness.h"

int main() {
  for (const sanitize::Run& run : sanitize::runs()) {
    const int before = sanitize::mismatches();
    run.body();
    printf("%-32s %s\n", run.name.c_str(), sanitize::mismatches() == before ? "ok" : "WRONG");
  }
  if (sanitize::runs().empty()) fprintf(stderr, "nothing was registered\n");
  return sanitize::mismatches() || sanitize::runs().empty();
}
