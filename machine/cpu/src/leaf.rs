//! One answer of CPUID.

/// A register of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// What CPUID answers for one leaf (EAX) and, where `indexed`, one subleaf (ECX).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leaf {
    /// The leaf.
    pub function: u32,
    /// The subleaf; 0 where there are none.
    pub index: u32,
    /// Whether the answer depends on the subleaf.
    pub indexed: bool,
    /// Answer.
    pub eax: u32,
    /// Answer.
    pub ebx: u32,
    /// Answer.
    pub ecx: u32,
    /// Answer.
    pub edx: u32,
}

impl Leaf {
    pub(crate) const fn new(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Self {
        Self {
            function,
            index: 0,
            indexed: false,
            eax,
            ebx,
            ecx,
            edx,
        }
    }

    pub(crate) const fn sub(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Self {
        Self {
            function,
            index,
            indexed: true,
            eax,
            ebx,
            ecx,
            edx,
        }
    }

    pub(crate) fn get(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }

    pub(crate) fn get_mut(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

/// The answer in a list.
pub(crate) fn find(leaves: &[Leaf], function: u32, index: u32) -> Option<&Leaf> {
    leaves
        .iter()
        .find(|l| l.function == function && l.index == index)
}
