//! iperf3 between guest and host, and between two guests. What must be is that the bytes arrive; how
//! fast they do is told and nothing more.

use std::process::{Child, Stdio};

use anemone_guest_init::place::Place;

use crate::vm::{self, Result, Vm};
use crate::{net, sys};

/// Port of a server in a guest, iperf3's own.
const PORT: u16 = 5201;
/// What a sender sends, as iperf3 is told.
const AMOUNT: &str = "64M";
/// The fewest bytes that must have arrived: what buffers still hold at the end is not counted.
const ENOUGH: u64 = 32 << 20;

/// A server that runs until this is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Through passt, with connections of both sides.
pub fn passt(place: &Place) -> Result<()> {
    let (port, forwarded) = (net::free_port()?, net::free_port()?);
    let server = vm::client(place, "iperf3")
        .args(["--server", "--bind", "127.0.0.1", "--port"])
        .arg(port.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    let _server = Server(server.map_err(|e| format!("cannot start iperf3: {e}"))?);
    let net = format!(
        "user,host-loopback,forward=tcp:{forwarded}-{PORT},passt={}",
        place.passt.display()
    );
    let steps =
        format!("lease,iperf,iperfserve,poweroff anemone.iperf={port} anemone.amount={AMOUNT}");
    let fs = clients(place);
    let mut vm = Vm::start(place, &steps, &["--net", &net, "--fs", &fs, "--cpus", "2"])?;
    vm.wait_for("guest: iperf listens")?;
    // One test: a second connection to the guest's server is reset, from whichever side the first has
    // sent; why is not known.
    let text = connect(place, forwarded)?;
    let (bytes, rate) = received(&text).ok_or_else(|| format!("iperf3: {text}"))?;
    let line = format!("{bytes} bytes, {rate} Mbit/s");
    expect_enough("passt, from the host that has connected", &line)?;
    finish(&mut vm)?;
    expect_both(&vm, "passt, {} the host")
}

/// What iperf3 on this host says of a test with the guest's server.
fn connect(place: &Place, port: u16) -> Result<String> {
    let output = vm::client(place, "iperf3")
        .args(["--json", "--bytes", AMOUNT, "--client", "127.0.0.1"])
        .args(["--port", &port.to_string()])
        .output()
        .map_err(|e| format!("cannot start iperf3: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.success() {
        true => Ok(text),
        false => Err(format!("iperf3: {text}")),
    }
}

/// Between two guests, each on a tap of its own, with this host as the router.
pub fn taps(place: &Place) -> Result<()> {
    sys::leave_network().map_err(|e| format!("a network namespace: {e}"))?;
    net::make_tap(place, "left", "10.0.1.1/24")?;
    net::make_tap(place, "right", "10.0.2.1/24")?;
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(|e| format!("ip_forward: {e}"))?;
    let fs = clients(place);
    let start = |steps: &str, tap: &str| {
        let net = format!("tap={tap}");
        let name = format!("--name={tap}");
        Vm::start(place, steps, &["--net", &net, "--fs", &fs, &name])
    };
    let mut server = start(
        "static,iperfserve,poweroff anemone.address=10.0.1.2/24,10.0.1.1,10.0.2.2",
        "left",
    )?;
    server.wait_for("guest: iperf listens")?;
    let steps = format!(
        "static,iperf,poweroff anemone.address=10.0.2.2/24,10.0.2.1,10.0.1.2 \
         anemone.iperf={PORT} anemone.amount={AMOUNT}"
    );
    let mut client = start(&steps, "right")?;
    client.expect_exit(0)?;
    finish(&mut server)?;
    expect_both(&client, "two taps, {} the other guest")
}

fn finish(vm: &mut Vm) -> Result<()> {
    vm.type_text("\n")?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: done"])
}

/// The guest's own two figures.
fn expect_both(vm: &Vm, what: &str) -> Result<()> {
    vm.expect_said(&["guest: done"])?;
    let said = vm.said();
    for way in ["to", "from"] {
        let wanted = format!("guest: iperf {way} the other side: ");
        let figures = said.lines().find_map(|line| line.strip_prefix(&wanted));
        let figures = figures.ok_or_else(|| format!("{wanted:?} was not said"))?;
        expect_enough(&what.replace("{}", way), figures)?;
    }
    Ok(())
}

/// `figures` are like `16777216 bytes, 300 Mbit/s`.
fn expect_enough(what: &str, figures: &str) -> Result<()> {
    println!("figures: {what}: {figures}");
    let bytes = figures
        .split(' ')
        .next()
        .and_then(|n| n.parse::<u64>().ok());
    match bytes.is_some_and(|bytes| bytes >= ENOUGH) {
        true => Ok(()),
        false => Err(format!("{what}: {figures} of {AMOUNT}")),
    }
}

/// Bytes and Mbit/s that the receiver has counted, of iperf3's JSON.
fn received(json: &str) -> Option<(u64, u64)> {
    let (_, sum) = json.split_once("\"sum_received\"")?;
    let number = |name: &str| -> Option<f64> {
        let (_, rest) = sum.split_once(&format!("\"{name}\":"))?;
        rest.split([',', '}']).next()?.trim().parse().ok()
    };
    let rate = number("bits_per_second")? / 1e6;
    Some((number("bytes")? as u64, rate as u64))
}

fn clients(place: &Place) -> String {
    format!("tag=clients,path={},readonly", place.clients.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_receiver() {
        let json = "\"sum_sent\":\t{\n\"bytes\":\t1,\n\"bits_per_second\":\t2\n},\n\
                    \"sum_received\":\t{\n\"start\":\t0,\n\"bytes\":\t16777216,\n\
                    \"bits_per_second\":\t3.5e+8,\n\"sender\":\ttrue\n}";
        assert_eq!(received(json), Some((16_777_216, 350)));
        assert_eq!(received("{\"error\": \"unable to connect\"}"), None);
        assert!(expect_enough("x", "67108864 bytes, 350 Mbit/s").is_ok());
        assert!(expect_enough("x", "167772 bytes, 350 Mbit/s").is_err());
        assert!(expect_enough("x", "").is_err());
    }
}
