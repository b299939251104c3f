# Ends the section that runtime.s begins.

    .subsection 3
bare_cases_end:
    .popsection
