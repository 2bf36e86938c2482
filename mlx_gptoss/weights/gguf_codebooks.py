"""llama.cpp's types with codebooks, IQ1_S to IQ3_S: eight or four values share an index into a table of magnitudes, or
of -1, 0 and 1.

The tables are constants of the format (ggml-common.h), here with 2 or 3 bits for each entry, lowest bits first,
compressed and in base 85. Of IQ1's, which has 2048 of the 3^8 rows in order, it is a bit for each row.
"""

from __future__ import annotations

import base64
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_IQ2_LEVELS = (8, 25, 43)
_IQ3_XXS_LEVELS, _IQ3_S_LEVELS = (4, 12, 20, 28, 36, 44, 52, 62), (1, 3, 5, 7, 9, 11, 13, 15)
_IQ2_XXS = (
    "c-jTQ!D`|_7y#gZhJR$tX-1;NJ&h6<w@>jWBoccXi<N9oi72>lF$tq|dy2(Ed$Ywu_bvDP05}Mc5P*gd3`}7TcaT5^7D}jL2M$_zfiGYTnPNjm%("
    "Hg}obxGfIYUH+6O55C#R4mA&|`-;1i^(AMl8f1;lx?=d#Xo0-@Eld3MpkM=Q5F*wDLhdOYBph2VuYzDy1fhRHeM?)SCh=wb52TX{X~sK7de$CY*)"
    "K(1p=(JA~0_#3GDTL{SsLSd6dZ)ekV-1ST`Jai%rDCdCA%e9B^sRZQ_FhFLP(&AOj*ZswPHcE<=wQA87piKw6rRn(BDjvz5fow($fuvDc*x=9ZyW"
    "HK|E%RaI}9_O%N1s1BHA}?TBF6(8x%<sE<u+nNfw#GX9Y;l#YZmaV{w|-p*k8HEvK&i`dxhv_ne8NgqR2?d)AM0paZDA*NYCqWfeR=@LUEmVeI&7"
    "kb8r?FFUiqOXUwJq#j+bNqM5pS+pYgAL!A^B?N8M*PI=gfJ3YY06yR6=tck{uo_IkYbKjAC7*>C*!9|e4GT>"
)
_IQ2_XS = (
    "c-jTQQBUeT7y#h6O}iAX+NGH3RUu%IU(qg|8D4c}5Ik3t$QKX4q9fBxuF#-SuO{)B$*=sL2LJ;F23-&!;RH@W!2m`u1_Kr@VG0heVFnAhg*))Dfd"
    "{DJ8TRl24Io5NfI5hy5cN=m&QKo>kw!5}P>M2?qXONd5>;r20Aoxs!vagJu)!8PJi{JuF(QNnq(e9fNsmONPliO3m?R`68Oh0<6r>~-*%6?aQp%{"
    "Hk}7JbrH<ZGPf<Vu9-Id{h=VEsh8bmyb(vt2DK=t;S?1V+dDgHaLmkrL9o;EAPaWv0?zsEbZMujP9`Fw5Jmftd@jf4N&10VMlxIBW1z+=$SA54oU"
    "_k{FLP(*65mq?i#a_G#6p}Cqd8or81c@b;ObRKbl15rNl}_GCFHw*5cu)7>M4n7fP(&ggg^`Z(=rMv*divjKcJ_M)3M;CZ>MEh6QpzZ+obswss89"
    "O5uls3#)rY}g;0Nsh4atxXFNS&uBQv@leT>lg+4;{ojM=z5R^!>Y9v{Z{7rP5KQIpN2o@^&b6CLP|<~r0p9qGOvYOQ0P=u}_nOy|1LD_!bJ?=%=}"
    "s9{DJX_PU>8fUzDFb9KT67x8WFJc{o#g<xTg_ZWyDr>B@&U(AIC?N??hKWu-6S(YN+DmtdQj+pir%9Tp%M_+!YNu}ccS^3nVMiTv!bzvx*coS?bK"
    "aqhWIXF-I*T*7w%5mNl#`t2{aoioUglpp%-GD&>REq&KmVG;LN3h0Ej|`!H~J>NdH910Qt(0-d9f@Wi{Aonhs&$w%M$KR?)XZtlGXPL-LLOQe}i?"
    "tUarAoPd)R(ORxOI8*jby-fw*Cj~<nz3`$<=GAnON*r<))Y&OlN-Jpt8yb7ycrK_TPs^Gys{CkKV*N;%MdQ|_ZeZ8sMI(Qmv{kGn|ZQCu{ksaUZ-"
    "F#Q=;Cb+T_dI`jdVxLN+r8T__7|_a*OyoGmc9SHPd|E}#V0hlVNJJD&7^6X?Ca+1=L-(_zz&mxKQssZ{rbK7dH?CQsvWfBwrSgz{8qn@zvJWN_<T"
    "Gb{|C1a?)v"
)
_IQ2_S = (
    "c-jTQL2sf=0|4L|GD8MWGh{HZr@>%j{S`B0AlTDju(3U1qnqyj3NX-EPuO7NekW_(H(h___dEbt00ROBfB_DMAOHf4z!*$`0ve=X1`L>k1z3U=Sc"
    "9M77pTA%v|tAgpa*C07u*1Z2-?tr6uQuZJ`7<5C5&MLGnm5yKEfwh!VP?dHEdu9Kj0C5!7BuoWnqh0%;J`?rk1j_m0B~)SPQGNT5E6h*2RJdAsab"
    "}A{TkcM<I&P9lA#n#VA1;dO$fU&?9<6C3-;{RHFvHp?B1wBRZikbVUGL7-ND5m|>2GIKTpr@dPWZaf)Zy;5lC4C0^k*uJ9JOc!v+T$7c*}WZSl5Q"
    "`@tpo!FV3+l5`)wcXgA4TwcBA%qc5h9n?@jLDQJqDe|-#E>~zkR@4>HK|BTdU7MsK@N3X$8&rqbfl9wnUgz(Q#!TNIbgsBd@veJ2GfBV{24%ss7)"
    "P8sY^ZT(~w5=j!GKSgl06S1%0GXw4^U|Ltkl48~R2&dZZ`%MXwYvi(y9CfHB6|kOfSz5gW4!Q%tjz&6r_xwqQ%PVry2hEo<419aztxi(JR0uIGks"
    "<VrVjbGLA7w{bfcaEoJ3IOCiTdB6o9^9fg6^OVoH;d8#=OTOZ3Uhyq&`HmlW&(9os$g@4iqn_(|p6`WT<Vi2~5-;;|ukcE*_8PDAzz`3~kPZ1z4A"
    "oE%&9EBYhR{d8?K?j8J>U03U;441_?e&kg<tx$-}oS~0vwQl1w0Ue3UpwCU%@3nKj;tn<M9U&mcW7tCb$@iKnO7wQ=x<wM$E-RtVJdEq8B#-Lln}"
    "`4ZSc7Wf+G^n1@AJhIQD4T?j^l(P%UoO-FiUM!V5|^gV(RitNaVXyiqH6h=`bqc}>UEXt!IDx*4TqAmhsJSJl{=3_BdV?8$GpW|u_@6a8+lXp*dV"
    "1g%X!Y68?CuXvr+$QiI-P8Ny{a`wpuBW@{ehMX$wsa(wuJoiYf5=cq@=i(_%S2}KLFTfMkMc>D@<ncBEgRX%qddtkd6hs}3M-<R;%cY@CDcfbl~P"
    ")zYNm{utA$#sm0GJxZB?sw>Y#dcRxm~}josLb{WywcoWxn2$3<Mmb=<^2TN-Pk2byWFhdR(gkMvkiw9;CqdZvw@>xEwGm0s&gZ*{A8`k;G#)-XYd"
    "oj3_i+{8=#But`2CUKG^S&}D3QYOEXI%$$F0jZVZl%y=>sYq3-Q<GNd-xOvjb26H_nV0!lm_?b);w;IsEYFIp%$lsrz|5NA8JV#epNW~8>6w{Tv("
    "FiPKo9gmJ^*7GY=~ioo1qDeFe5WI6QhhashJsL=4N4*W@Xl<GF#J{ojI7^z#Qdv?&LIgb1(PvFpqMX$9a-xd7c+}nb&!fcR85jIhnILpNqMg>$#c"
    "#npbmJpu#Skf);M!6@C#GQ6Y=CNQ$h;i=rrtx@d~701In@7i7T}d?6NUp%-RRE#M=1q>p!x@)0bpC0>#xTk@q?s-<3<<@2&y!YA}ZpX3vG4xZcR?"
    "`K$|(k^M~mR{+XVHuUOOv<dx%c3mHrtC_vvQ~ISR&2#rVx?AkWmeVd&kDWJ7y0t|^7R7Ncum%9&DUbB)_QH$)f#TlhHm8MVe`8A*npq?Pxy*n>Fe"
    "h8^a_4Wf5pGQeuK)Ya78Ls@hYf9HLg^pD^ty@MYXI}RaLdsq3SDGquQxy?bcrH*I^yivX1Md&g#4_>bh>~uKrhpE#3~cY|FQ5tG8wg8`Rj1)6m9k"
    "yvA?BMmBMiG+C23MN>9)(==TJTC2q^X<5r#(W+Lrrmfn23*XQieY<~?Z(xUaY{z$Mr*~#|*}-@8F5frrqy2LKyx;CGd)T4Q>1gM6UgvjFC%d>yx~"
    "$8)qAR<)Yr3uj2Yg@$eozN}Fo)*@{6HV{Lw@}C0eY*)J?UA`d(o?2_olD<&mJDpksjsobo@Gk&-8Qs2~X%mPj@GI`ga0<W`E{?y8nSQJ`c|PJUUO"
    "$>a5S^d^z9F@@w;DT?UuYWpbHbwwK*yfBC+^E4tFFyuM$rSMWFZoBucXo_t@vi+^wb$Zc>Fx6y5K+ud%r{{y~e?!N"
)
_IQ3_XXS = (
    "c-jGg0e}7gAOHlA01NN{5Fh~=AObtk13@qZNT38!Pz6|^1!2GjcmN23KnRHd36hWroA3##@Cv;U499>B%1{mXun-?X5-+h6JrNW~p%rS;8MJ{M%;"
    "6m45g!3EAPAx$5i%hdq9Gh|A}9hRLXsp<A|-(`D2Spck%B3@0xZG;E!ko&_7X4!gECM<HD;4Hg(E%S13&_lKnnyx5@bOcBtk(nL`8%|N)$y{G)H%"
    "YM}Q<qiS$U2BuSqHO05)3$iz(e#7`ZyQbToBVZ~R$HC)bBUIB(+3Kn4#hGI3QV?ZWkP?lw6W@dplXoyy6s-|nnwrv=9aykceMkjS`$9SGMd)o(p1"
    "o(g*_<<|<f_w;xp9qSuXp6^Kjs%&KG+C8niI>HRoXUxv3L2s~3ZzDArESWnnyRb9x~>R2u@|eeLYuXyOTFSt!6a<LG#tfo{K&M7&E8DXMXlDGJ>1"
    "bf;01o*2(IBOZslOE=%udez~1cJ4(|~k@<1>2RFC=CTA4T"
)
_IQ3_S = (
    "c-jE~1ONO05C8&D00)2o37`NB-~bR10Tr+TARq!IZ~`f?0x%#0Ilu!y00coG1Vn%YNzepPFa=kT1zkV}aZm?(00@Cl2#0_Oi{J>6Pzjj838GL6r;"
    "rM(fD5}Y49U<8&>#)junpco4(Ol`_mB_$01ylD5D`HU8UYd`krFr|6hr|PQehQa5f)`}7Iv{0hLISHkr}Fy8^9qP!~q@BVIA9n9_#@i0U{s-f*=X"
    "9APw>$5F#NN!XX~QA}$gmIszm?G9*TVBuo+|Sh6Kyf+lK$Cw>Abiqa^L0x6WDDWEbctpY2$5-h}WEXcAf(Q+-=!Y$z<FZePr1*0$wlQA13GA4sEE"
    "E6<HvoukIHCmH4kV83_Lpr7tJi~)L$`d`^6F%~TKL8X!15`i<gg^?!Kn@f^6Ldisq(LDxLM4PkDs)3Qv_m}vL_&l_OY}riR7F|DMPigjfka4$6iJ"
    "hWNuLx-tMp2_#7n>=OvRK;(nL+!v`ylKPWBW~2L(|RrBNLfQaaUBM3q!h^;KZCR(J(if^}Gt)mpJtT*+l!*fn10C144*U=8+Q5|&{b)?p$>Vkeej"
    "GnQjPHe^M{WKlL{U<PM;=4XJWXpp99oQ7(_hHT6hZPRvb*cNW%c5dyqZv&Tb4kvLLr*beyb3uo6N>_DSM|N(vca9f&!8d%+Cw<)qfCQ+35J-U+sD"
    "UAff;cFIN0@|5D1}(qg=3h8Z5W7yh=`3CiJJ(DuPBSSNQ}w2jL;~J+1QN$DUcNTksz6qMR}A_DVK}MnXrkR&551knVtfQpbRRZAWEVqs-iZ^qd_{"
    "PMXIDxs-=1gsEInMnChvkDy+wftk+7e=~}P*8n6Tlu^MZ#N^7-gySAb$yu>TL3B14!oWUCm!$1thS4_u>%*mqM%Cd~hz|73i49*oj(lQOyL(SE2U"
    "D%+V+{+E%1b*NUF5w;y;w&!XLZ0MQKIUZ}=!A~wjvnclp6bG`?cKia0blS75Ai53^<pphnGgJy=rZg"
)

_IQ1 = (
    "c-k#eK}(!R7=CxE;dM-9V?RN1diSfb(^(PgE$L;EU0C#DLh=VZ*|bQ>IZZw%yXlwN6ha`hG?#HO$v6$G@ldv(umMk2dT8mb2WdTox*h^v8VtnDuD#8"
    "?@Vw9Syw7v(LR2?w<}y}3b9YJG^C&5*&qs>Nl?x;NhAB!%0hRecnsm$a2YwJ@;QqccSPG~@n#@N5uBY$^gNY22s7}?HYgoxmY#Y+!Ajh1yxWA4l1Oz"
    "VO1-XRyWBes^wA;LAoBq<x!%nuPhFWp9`{&R@7DG%<XIwD^Is3Q$Jf@<B<<hd(0^?jzIHG8vQn*?-$Ub(LsHW&@kYNcQ%|}dP%c;av8KJU^mWiJv*2"
    "8-WD<$YEG%#}+D!ES;XeDuFD(VlG#i@A4$V;H%7rH52w&LB_pg1xSvl=L<CZ@9?{WdkSxbxSuMq|l64F4MqT|O(RS}O@H(bLXvHn!_OntvSw2GXTKi"
    "D_6XGLxujp0!)qyF+V=7Bv?g3oFy??D1-6?{(2le%HQrc>Le(m#@Cb_P%)g$;r#{<KcsUbe#9?p_<1{H>jE?+1SCIq;Fwj@yPMjA_U90?}vdY$)D1%"
    ">fQq-z{36HBT$I&mG*v%J#A~V%aSj@pZtCEAg}V1eou`2@uUxU_YQ=)6;l3U7EjmAKr#y2F0kdO91c}@u6ikZ68>90+)KINV7E3oVy0wcNC7Qg*Gnz"
    "$6Ckekcj5w;yQl$8BcV}uIeIA*;9XR~L2uzcrHYS+2)y-rqrtcg6e{stpn$cM#il(dTBx(R&0u-;P1DmAvG}u@dX;b%ns9v~6p49X^c}lqEMlIFjzJ"
    "Bbrp$X4T{{D_p5YV7e^~xM<^E7<_56qcAaL=FI+lT|4v2#Y&dpW2-Egd@Fdf5G@Dheeu*|v(bMFD;1sQ1"
)


@lru_cache
def _grid(text: str, levels: tuple[int, ...], width: int) -> Array:
    """The table of a type, int16 [entries, width]."""
    bits = 2 if len(levels) <= 4 else 3
    packed = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    flags = np.unpackbits(packed, bitorder="little").reshape(-1, bits)
    found: Array = np.array(levels, np.int16)[flags @ (1 << np.arange(bits))].reshape(-1, width)
    return found


@lru_cache
def _ternary_grid() -> Array:
    """The table of IQ1_S and IQ1_M, plus 1: uint8 [2048, 8] of 0, 1 and 2."""
    packed = np.frombuffer(zlib.decompress(base64.b85decode(_IQ1)), np.uint8)
    rows = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
    found: Array = (rows[:, None] // 3 ** np.arange(8) % 3).astype(np.uint8)
    return found


def _f16(data: Array) -> Array:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _signed(magnitudes: Array, signs: Array) -> Array:
    """The values [n, 256], negative where a bit of `signs` [n, 32] is set."""
    negative = np.unpackbits(signs, axis=-1, bitorder="little")
    flat = magnitudes.reshape(len(signs), -1)
    return np.where(negative != 0, -flat, flat)


def _seven_bit_signs(words: Array) -> Array:
    """Sign bytes [n, 32] of uint32 [n, 8]: four of 7 bits each, of which the eighth makes the parity even."""
    seven = (words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127).astype(np.uint8)
    parity = np.unpackbits(seven[..., None], axis=-1).sum(axis=-1, dtype=np.uint8) & 1
    signs: Array = (seven | parity << 7).reshape(len(words), -1)
    return signs


def _nibbles(data: Array) -> Array:
    return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1).astype(np.float32)


def _codes(values: Array, scale: Array) -> tuple[Array, Array, Array]:
    """Values of groups of 32 as 8-bit codes, with scales and biases."""
    return (values + 128).astype(np.uint8), scale, scale * -128


def iq2_xxs(b: Array) -> tuple[Array, Array, Array]:
    words = np.ascontiguousarray(b[:, 2:]).view("<u4").reshape(len(b), 8, 2)
    index = np.ascontiguousarray(words[..., 0]).view(np.uint8).reshape(len(b), 32)
    scale = _f16(b[:, :2]) * (np.float32(0.5) + (words[..., 1] >> 28).astype(np.float32)) * np.float32(0.25)
    return _codes(_signed(_grid(_IQ2_XXS, _IQ2_LEVELS, 8)[index], _seven_bit_signs(words[..., 1])), scale)


def iq3_xxs(b: Array) -> tuple[Array, Array, Array]:
    words = np.ascontiguousarray(b[:, 66:]).view("<u4")
    scale = _f16(b[:, :2]) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    return _codes(_signed(_grid(_IQ3_XXS, _IQ3_XXS_LEVELS, 4)[b[:, 2:66]], _seven_bit_signs(words)), scale)


def iq3_s(b: Array) -> tuple[Array, Array, Array]:
    index = b[:, 2:66].astype(np.uint16) | np.unpackbits(b[:, 66:74], axis=-1, bitorder="little").astype(np.uint16) << 8
    scale = _f16(b[:, :2]) * (1 + 2 * _nibbles(b[:, 106:110]))
    return _codes(_signed(_grid(_IQ3_S, _IQ3_S_LEVELS, 4)[index], b[:, 74:106]), scale)


def _by_16(values: Array, d: Array, scales: Array) -> Array:
    scale = d * (np.float32(0.5) + _nibbles(scales)) * np.float32(0.25)
    found: Array = (values.reshape(len(values), 16, 16).astype(np.float32) * scale[..., None]).reshape(len(values), -1)
    return found


def iq2_xs(b: Array) -> Array:
    words = np.ascontiguousarray(b[:, 2:66]).view("<u2")
    seven = (words >> 9).astype(np.uint8)
    parity = np.unpackbits(seven[..., None], axis=-1).sum(axis=-1, dtype=np.uint8) & 1
    values = _signed(_grid(_IQ2_XS, _IQ2_LEVELS, 8)[words & 511], seven | parity << 7)
    return _by_16(values, _f16(b[:, :2]), b[:, 66:74])


def iq2_s(b: Array) -> Array:
    high = (b[:, 66:74, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(len(b), 32)
    values = _signed(_grid(_IQ2_S, _IQ2_LEVELS, 8)[b[:, 2:34] | high.astype(np.uint16) << 8], b[:, 34:66])
    return _by_16(values, _f16(b[:, :2]), b[:, 74:82])


def iq1_s(b: Array) -> tuple[Array, Array, Array]:
    """d * (2 * scale + 1) * (table +- 1/8), with a scale and a sign of the offset per 32 values."""
    words = np.ascontiguousarray(b[:, 34:]).view("<u2")
    high = words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    codes = _ternary_grid()[b[:, 2:34] | high.reshape(len(b), 32) << 8]
    scale = _f16(b[:, :2]) * (2 * (words >> 12 & 7) + 1).astype(np.float32)
    return codes.reshape(len(b), 256), scale, scale * np.where(words & 0x8000, np.float32(-1.125), np.float32(-0.875))


def iq1_m(b: Array) -> Array:
    """As iq1_s, with a scale per 16 values, and a sign of the offset per 8. The four top bits of the words of scales
    are d."""
    words = np.ascontiguousarray(b[:, 48:]).view("<u2")
    d = (words >> 12 << np.arange(0, 16, 4, dtype=np.uint16)).sum(axis=-1, dtype=np.uint16).view("<f2")
    scales = (words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(len(b), 16)
    scale = d.astype(np.float32)[:, None] * (2 * scales + 1).astype(np.float32)
    high = np.stack([b[:, 32:48] & 15, b[:, 32:48] >> 4], axis=-1).reshape(len(b), 32).astype(np.uint16)
    table = _ternary_grid()[b[:, :32] | (high & 7) << 8].astype(np.float32)
    offset = np.where(high & 8, np.float32(-1.125), np.float32(-0.875))
    values = (table + offset[..., None]).reshape(len(b), 16, 16) * scale[..., None]
    found: Array = values.reshape(len(b), 256)
    return found
