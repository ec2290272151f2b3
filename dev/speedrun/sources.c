// The text that a trainer was built from, inside of it: its log can then say what ran. Linked to the trainers
// only; a program without it has no sources, and refuses tracks. The Makefile gives SOURCES, the file that
// holds them all, and FLAGS, the compiler and its flags.
__asm__(".pushsection .rodata\n"
        ".globl srdit_sources, srdit_sources_end\n"
        "srdit_sources:\n"
        ".incbin \"" SOURCES "\"\n"
        "srdit_sources_end:\n"
        ".byte 0\n"
        ".popsection\n");
const char srdit_flags[] = FLAGS;
