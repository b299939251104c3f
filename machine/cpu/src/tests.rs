use super::*;
use crate::leaf::find;

/// A host that offers everything that `model` needs.
fn host_for(model: &str) -> Vec<Leaf> {
    let mut leaves = vec![
        Leaf::new(0x0, [0x20, 0x6874_7541, 0x444D_4163, 0x6974_6E65]),
        Leaf::new(0x1, [0x00A2_0F12, 0, 0, 0]),
        Leaf::sub(0x4, 0, [1 << 5 | 1, 0, 0, 0]),
        Leaf::sub(0x4, 1, [3 << 5 | 3, 0, 0, 0]),
        Leaf::new(0x6, [0; 4]),
        Leaf::sub(0x7, 0, [0; 4]),
        Leaf::new(0x4000_0000, [0; 4]),
        Leaf::new(0x4000_0001, [0; 4]),
        Leaf::new(0x8000_0001, [0; 4]),
        Leaf::new(0x8000_0008, [0x3030, 0, 0xFFFF, 0]),
    ];
    let features = Model::find(model).unwrap().features();
    // KVM does not report what it always has.
    features
        .filter(|f| !topology::ALWAYS.contains(f))
        .for_each(|f| f.set(&mut leaves));
    leaves
}

fn get(leaves: &[Leaf], function: u32, index: u32) -> Leaf {
    *find(leaves, function, index).unwrap_or_else(|| panic!("leaf {function:#x}.{index}"))
}

#[test]
fn levels_contain_the_levels_below() {
    for pair in MODELS.windows(2) {
        let [small, large] = pair else { unreachable!() };
        assert!(
            small.features().all(|f| large.features().any(|g| g == f)),
            "{}",
            large.name
        );
        assert!(large.features().count() > small.features().count());
    }
    let names = names();
    assert_eq!(names, ["host", "x86-64-v1-1", "x86-64-v2-1", "x86-64-v3-1"]);
}

#[test]
fn missing_features_are_named() {
    let host = host_for("x86-64-v2-1");
    assert!(cpuid("x86-64-v2-1", &host, 0, 1).is_ok());
    let error = cpuid("x86-64-v3-1", &host, 0, 1).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("`x86-64-v3-1`") && text.contains("avx2") && text.contains("fma"));
    assert!(!text.contains("sse4_2"), "{text}");
    let unknown = cpuid("z80", &host, 0, 1).unwrap_err().to_string();
    assert!(
        unknown.contains("`z80`") && unknown.contains("x86-64-v2-1"),
        "{unknown}"
    );
}

#[test]
fn frozen_models_do_not_depend_on_what_else_the_host_has() {
    let plain = host_for("x86-64-v3-1");
    let mut rich = plain.clone();
    for leaf in &mut rich {
        if !matches!(leaf.function, 0 | 0x8000_0008) {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (!0, !0, !0, !0);
        }
    }
    rich.push(Leaf::new(0x8000_0007, [0, 0, 0, 1 << 8]));
    for model in MODELS {
        assert_eq!(
            cpuid(model.name, &plain, 1, 4),
            cpuid(model.name, &rich, 1, 4)
        );
    }
}

/// The tables as they are. A difference is a new version of the model, never a change of this one.
#[test]
fn tables_are_frozen() {
    let table = |model: &str| {
        let mut text = String::new();
        for l in cpuid(model, &host_for(model), 0, 1).unwrap() {
            let Leaf {
                function,
                index,
                eax,
                ebx,
                ecx,
                edx,
                ..
            } = l;
            text += &format!("{function:x}.{index} {eax:x} {ebx:x} {ecx:x} {edx:x}\n");
        }
        text
    };
    for model in MODELS {
        let path = format!("{}/golden/{}.txt", env!("CARGO_MANIFEST_DIR"), model.name);
        if std::env::var_os("ANEMONE_BLESS").is_some() {
            std::fs::write(&path, table(model.name)).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap();
        assert_eq!(table(model.name), golden, "{}", model.name);
    }
}

#[test]
fn topology_of_the_third_of_six() {
    for model in ["host", "x86-64-v2-1"] {
        let leaves = cpuid(model, &host_for("x86-64-v2-1"), 2, 6).unwrap();
        let l1 = get(&leaves, 1, 0);
        assert_eq!(l1.ebx & 0xFFFF_0000, 2 << 24 | 6 << 16);
        assert_eq!(
            (
                l1.ecx >> 31,
                l1.ecx >> 24 & 1,
                l1.ecx >> 21 & 1,
                l1.edx >> 28 & 1
            ),
            (1, 1, 1, 1)
        );
        let first_level = get(&leaves, 4, 0).eax;
        assert_eq!((first_level >> 14 & 0xFFF, first_level >> 26), (0, 7));
        let shared = if model == HOST {
            get(&leaves, 4, 1)
        } else {
            get(&leaves, 4, 3)
        };
        assert_eq!(
            shared.eax >> 14 & 0xFFF,
            5,
            "the last level is shared by all"
        );
        assert_eq!(get(&leaves, 0x8000_0008, 0).ecx & 0xF0FF, 3 << 12 | 5);
        let level = |n| get(&leaves, 0xB, n);
        assert_eq!((level(0).eax, level(0).ebx, level(0).ecx), (0, 1, 0x100));
        assert_eq!((level(1).eax, level(1).ebx, level(1).ecx), (3, 6, 0x201));
        assert_eq!(level(2).ecx, 2);
        assert!((0..3).all(|n| level(n).edx == 2));
    }
}
